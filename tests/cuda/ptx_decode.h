// From a statement to a function that runs it. A decoder takes every dot of an opcode or the module
// is refused: an unread suffix could change the result without a word.
#pragma once
#include <deque>

#include "ptx_text.h"

namespace ptx {

using emulator::bits_as;
using emulator::fail;
using emulator::smem;

struct Frame;
struct Instruction;
using Run = void (*)(Frame&, const Instruction&);

struct Instruction {
  Run run = nullptr;
  int guard = -1;
  bool guard_negated = false;
  bool branches = false;
  bool ftz = false;       // subnormal operands and results are zero
  std::vector<int> d, a;  // slots written and read, vectors laid flat; -1: nowhere
  int64_t offset = 0;     // of an address; of a branch, its target
  int n = 0, m = 0;       // what else the decoder wants to tell
  int number = 0;         // place in the kernel
  const std::string* text = nullptr;
};

struct Program {
  Text text;
  std::vector<Instruction> code;
};

struct Accumulators {  // of wgmma: out of the registers while a product is under way
  std::vector<int> slots;
  std::vector<float> values;
  bool away = false;
};

struct Frame {  // one thread's registers
  const Program& program;
  const std::vector<const uint8_t*>& parameters;
  int threads[3];
  std::vector<uint64_t> r;
  size_t pc = 0;
  std::vector<uint64_t> visits;  // of instructions that touch shared memory
  std::map<std::vector<int>, std::unique_ptr<Accumulators>> accumulators;
  std::vector<std::pair<int, uint32_t>>
      reading;  // registers that products issued since the last commit read
  std::deque<std::vector<std::pair<int, uint32_t>>> reading_groups;

  template <class T>
  T get(int slot) const {
    if constexpr (std::is_same_v<T, bool>) {
      if (r[slot] > 1) fail("a predicate that nothing has set is read");
      return r[slot] != 0;
    } else {
      return bits_as<T>(r[slot]);
    }
  }
  template <class T>
  void set(int slot, T x) {
    if (slot >= 0) r[slot] = bits_as<uint64_t>(x);
  }
};

[[noreturn]] inline void refuse(const Statement& s, const std::string& why) {
  throw Failure("ptx: " + why + " in `" + s.text + "`");
}

// The dots of an opcode, taken from the left.
class Dots {
 public:
  explicit Dots(const Statement& s) : statement(s) {
    std::string part;
    for (size_t i = 0; i <= s.opcode.size(); ++i) {
      if (i < s.opcode.size() && s.opcode[i] != '.') {
        part += s.opcode[i];
      } else {
        parts_.push_back(part);
        part.clear();
      }
    }
  }
  const Statement& statement;
  const std::string& name() const { return parts_[0]; }
  bool take(const std::string& dot) {
    if (at_ >= parts_.size() || parts_[at_] != dot) return false;
    ++at_;
    return true;
  }
  void want(const std::string& dot) {
    if (!take(dot)) refuse(statement, "expected ." + dot);
  }
  // Index of the next dot in `names`.
  int one_of(const std::vector<std::string>& names) {
    for (size_t i = 0; i < names.size(); ++i)
      if (take(names[i])) return int(i);
    refuse(statement, "suffix " + (at_ < parts_.size() ? "." + parts_[at_] : "missing"));
  }
  std::string next() {
    if (at_ >= parts_.size()) refuse(statement, "a suffix is missing");
    return parts_[at_++];
  }
  void end() {
    if (at_ < parts_.size()) refuse(statement, "no meaning for ." + parts_[at_]);
  }

 private:
  std::vector<std::string> parts_;
  size_t at_ = 1;
};

// What a decoder fills: the instruction, and whole instructions before it if need be.
struct Decoding {
  const Statement& s;
  Program& program;
  Instruction i;

  void refuse_operands(size_t count) {
    if (s.operands.size() != count) refuse(s, "expected " + std::to_string(count) + " operands");
  }
  int into(const Operand& o) {
    if (o.kind == Operand::none) return -1;
    if (o.kind != Operand::value || o.negated) refuse(s, "cannot write to " + o.text);
    return o.slot;
  }
  int from(const Operand& o);
  void write(const Operand& o) { i.d.push_back(into(o)); }
  void read(const Operand& o) { i.a.push_back(from(o)); }
  void write_all(const Operand& o) {
    if (o.kind != Operand::vector) return write(o);
    for (auto& part : o.parts) write(part);
  }
  void read_all(const Operand& o) {
    if (o.kind != Operand::vector) return read(o);
    for (auto& part : o.parts) read(part);
  }
  void address(const Operand& o) {
    if (o.kind != Operand::address || !o.parts.empty())
      refuse(s, "expected an address, got " + o.text);
    i.a.push_back(o.slot);
    i.offset = o.offset;
  }
  // d = op(a, b, ...)
  void plain(size_t operands) {
    refuse_operands(operands);
    write(s.operands[0]);
    for (size_t n = 1; n < operands; ++n) read(s.operands[n]);
  }
};

inline int Decoding::from(const Operand& o) {
  if (o.kind != Operand::value || o.second >= 0) refuse(s, "cannot read " + o.text);
  if (!o.negated) return o.slot;
  Instruction inverse;
  inverse.run = [](Frame& f, const Instruction& i) {
    f.set<uint64_t>(i.d[0], !f.get<bool>(i.a[0]));
  };
  inverse.d = {program.text.slots++}, inverse.a = {o.slot};
  inverse.text = &s.text;
  program.code.push_back(inverse);
  return inverse.d[0];
}

using Decoder = void (*)(Dots&, Decoding&);
using Decoders = std::map<std::string, Decoder>;

// Calls act(type tag) for the integer type named by the dot; what it is in C++ is decltype(tag).
template <class Act>
void integer_type(Dots& dots, const std::string& type, Act act) {
  if (type == "u16" || type == "b16") return act(uint16_t{});
  if (type == "s16") return act(int16_t{});
  if (type == "u32" || type == "b32") return act(uint32_t{});
  if (type == "s32") return act(int32_t{});
  if (type == "u64" || type == "b64") return act(uint64_t{});
  if (type == "s64") return act(int64_t{});
  refuse(dots.statement, "type ." + type);
}

}  // namespace ptx
