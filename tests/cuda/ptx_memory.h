// Loads, stores, address spaces, cp.async, control flow.
#pragma once
#include "ptx_logic.h"

namespace ptx {

enum Space { generic_space, global_space, shared_space, param_space };

struct Place {
  Space space;
  uint64_t address;  // in shared memory an offset, else a pointer of this process
};

inline const uint8_t* parameter_at(const Frame& f, uint64_t a, int bytes) {
  const uint64_t index = (a - kParameterSpace) / kParameterStep,
                 offset = (a - kParameterSpace) % kParameterStep;
  if (index >= f.program.text.parameters.size() ||
      offset + bytes > uint64_t(f.program.text.parameters[index].bytes))
    fail("ptx: access past the end of the parameters");
  return f.parameters[index] + offset;
}
inline bool is_parameter(uint64_t a) {
  return a >= kParameterSpace && a < kParameterSpace + (1 << 26);
}

// Where an access lands: generic addresses tell their space.
inline Place resolve(const Frame& f, const Instruction& i, int bytes) {
  const uint64_t a = f.r[i.a[0]] + uint64_t(i.offset);
  if (i.m == shared_space) return {shared_space, uint32_t(a)};
  if (i.m == param_space)
    return {param_space, reinterpret_cast<uint64_t>(parameter_at(f, a, bytes))};
  if (i.m == generic_space && a >> 48 == kSharedSpace >> 48)
    return {shared_space, a - kSharedSpace};
  if (is_parameter(a)) return {param_space, reinterpret_cast<uint64_t>(parameter_at(f, a, bytes))};
  return {global_space, a};
}

// ld and st: [space][cache hints][vector].type; i.n is the bytes of an element.
inline std::string decode_access(Dots& dots, Decoding& d, bool load) {
  if (dots.take("volatile")) refuse(dots.statement, "volatile access");
  d.i.m = generic_space;
  if (dots.take("global"))
    d.i.m = global_space;
  else if (dots.take("shared") || dots.take("shared::cta"))
    d.i.m = shared_space;
  else if (load && (dots.take("param") || dots.take("param::entry")))
    d.i.m = param_space;
  if (load && d.i.m == global_space) dots.take("nc");
  for (const char* hint :
       {"ca", "cg", "cs", "lu", "wb", "wt"})  // how caches treat it; the value is the same
    if (dots.take(hint)) break;
  for (const char* hint : {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
                           "L1::evict_last", "L1::no_allocate"})
    if (dots.take(hint)) break;
  for (const char* hint : {"L2::64B", "L2::128B", "L2::256B"})
    if (dots.take(hint)) break;
  d.i.d.clear();
  size_t wide = dots.take("v2") ? 2 : dots.take("v4") ? 4 : 1;
  const std::string type = dots.next();
  dots.end();
  d.refuse_operands(2);
  const Operand& data = d.s.operands[load ? 0 : 1];
  if (wide != (data.kind == Operand::vector ? data.parts.size() : 1))
    refuse(dots.statement, "vector length");
  d.address(d.s.operands[load ? 1 : 0]);
  load ? d.write_all(data) : d.read_all(data);
  d.i.n = type == "b8" || type == "u8" || type == "s8" ? 1 : width_of(dots, type) / 8;
  if (d.i.n == 0 || d.i.n * wide > 16) refuse(dots.statement, "type ." + type);
  return type;
}
inline void decode_load(Dots& dots, Decoding& d) {
  const std::string type = decode_access(dots, d, true);
  d.i.ftz = type[0] == 's';  // here: extend the sign
  d.i.run = [](Frame& f, const Instruction& i) {
    const int count = int(i.d.size()), bytes = i.n * count;
    const Place from = resolve(f, i, bytes);
    const auto pointer = reinterpret_cast<const uint8_t*>(from.address);
    const uint8_t* data = pointer;
    if (from.space == shared_space) {
      emulator::note_read(smem(from.address), bytes, "ld.shared");
      emulator::count_conflicts(i.number, f.visits[i.number]++, smem(from.address), bytes);
      data = emulator::shared_at(smem(from.address));
    } else if (from.space == global_space) {
      emulator::note_global(pointer, bytes, "ld.global");
    }
    for (int k = 0; k < count; ++k) {
      uint64_t v = 0;
      std::memcpy(&v, data + k * i.n, i.n);
      if (i.ftz) v = uint64_t(int64_t(v << (64 - 8 * i.n)) >> (64 - 8 * i.n));
      f.set(i.d[k], v);
    }
  };
}
inline void decode_store(Dots& dots, Decoding& d) {
  decode_access(dots, d, false);
  d.i.run = [](Frame& f, const Instruction& i) {
    const int count = int(i.a.size()) - 1, bytes = i.n * count;
    const Place to = resolve(f, i, bytes);
    uint8_t data[16];
    for (int k = 0; k < count; ++k) std::memcpy(data + k * i.n, &f.r[i.a[k + 1]], i.n);
    if (to.space == shared_space) {
      emulator::note_write(smem(to.address), bytes, "st.shared", data);
      emulator::count_conflicts(i.number, f.visits[i.number]++, smem(to.address), bytes);
      std::memcpy(emulator::shared_at(smem(to.address)), data, bytes);
    } else if (to.space == global_space) {
      emulator::note_global(reinterpret_cast<void*>(to.address), bytes, "st.global", data);
      std::memcpy(reinterpret_cast<void*>(to.address), data, bytes);
    } else {
      fail("ptx: a store to the parameters");
    }
  };
}

// cvta: generic addresses of global memory are pointers; of shared memory, offsets in a range of
// their own.
inline void decode_cvta(Dots& dots, Decoding& d) {
  const bool to = dots.take("to");
  const int space = dots.one_of({"global", "shared", "param"});
  dots.one_of({"u64", "u32"});
  dots.end();
  d.plain(2);
  d.i.m = space != 1 ? 0 : to ? 1 : 2;
  d.i.run = [](Frame& f, const Instruction& i) {
    const uint64_t a = f.r[i.a[0]];
    if (i.m == 1 && a >> 48 != kSharedSpace >> 48)
      fail("cvta.to.shared of another space's address");
    f.set(i.d[0], i.m == 1 ? a - kSharedSpace : i.m == 2 ? a + kSharedSpace : a);
  };
}

inline void decode_copy_async(Dots& dots, Decoding& d) {
  if (dots.take("commit_group")) {
    dots.end();
    d.refuse_operands(0);
    d.i.run = [](Frame&, const Instruction&) { emulator::copy_async_commit(); };
    return;
  }
  const bool all = dots.take("wait_all");
  if (all || dots.take("wait_group")) {
    dots.end();
    d.refuse_operands(all ? 0 : 1);
    if (!all) d.read(d.s.operands[0]);
    d.i.run = [](Frame& f, const Instruction& i) {
      if (i.a.empty()) emulator::copy_async_commit();
      emulator::copy_async_wait(i.a.empty() ? 0 : f.r[i.a[0]]);
    };
    return;
  }
  d.i.n = dots.one_of({"cg", "ca"});
  if (!dots.take("shared::cta")) dots.want("shared");
  dots.want("global");
  for (const char* hint : {"L2::64B", "L2::128B", "L2::256B"})
    if (dots.take(hint)) break;
  dots.end();
  if (d.s.operands.size() != 4) d.refuse_operands(3);
  d.address(d.s.operands[0]);
  const int64_t to_offset = d.i.offset;
  d.address(d.s.operands[1]);
  d.i.m = int(to_offset);
  for (size_t k = 2; k < d.s.operands.size(); ++k) d.read(d.s.operands[k]);
  d.i.run = [](Frame& f, const Instruction& i) {
    const int bytes = int(f.r[i.a[2]]), given = i.a.size() > 3 ? f.get<int>(i.a[3]) : bytes;
    if (i.n == 0 && bytes != 16) fail("cp.async.cg copies 16 bytes");
    const auto from = reinterpret_cast<const void*>(f.r[i.a[1]] + uint64_t(i.offset));
    emulator::copy_async(smem(f.r[i.a[0]] + uint64_t(i.m)), from, bytes, given);
  };
}

inline void decode_branch(Dots& dots, Decoding& d) {
  dots.take("uni");
  dots.end();
  d.refuse_operands(1);
  const Operand& target = d.s.operands[0];
  for (size_t k = d.s.scopes.size(); k-- > 0 && !d.i.branches;) {
    const auto found = d.program.text.labels.find({target.text, d.s.scopes[k]});
    if (found != d.program.text.labels.end()) d.i.branches = true, d.i.offset = found->second;
  }
  if (!d.i.branches) refuse(dots.statement, "no label " + target.text);
  d.i.run = [](Frame& f, const Instruction& i) { f.pc = size_t(i.offset); };
}
inline void decode_return(Dots& dots, Decoding& d) {
  dots.end();
  d.refuse_operands(0);
  d.i.run = [](Frame& f, const Instruction&) { f.pc = f.program.code.size(); };
}

inline const Decoders& memory_decoders() {
  static const Decoders all = {{"ld", decode_load},    {"st", decode_store},
                               {"cvta", decode_cvta},  {"bra", decode_branch},
                               {"ret", decode_return}, {"exit", decode_return}};
  return all;
}

}  // namespace ptx
