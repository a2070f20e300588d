// Runs the PTX that nvcc or Triton wrote, instruction by instruction: it proves what a build of the
// same source for the host cannot, the inline assembly and what the compiler made of the rest.
#pragma once
#include "ptx_warp.h"

namespace ptx {

inline Program decode(const std::string& module, const std::string& entry) {
  Program p;
  p.text = Parser::parse(module, entry);
  std::vector<int> first(p.text.statements.size() + 1);  // of a statement's instructions
  for (size_t n = 0; n < p.text.statements.size(); ++n) {
    const Statement& s = p.text.statements[n];
    first[n] = int(p.code.size());
    Dots dots(s);
    Decoder decoder = nullptr;
    for (auto* table :
         {&arithmetic_decoders(), &logic_decoders(), &memory_decoders(), &warp_decoders()})
      if (table->count(dots.name())) decoder = table->at(dots.name());
    if (!decoder) refuse(s, "no meaning for " + s.opcode);
    Decoding d{s, p, {}};
    d.i.guard = s.guard, d.i.guard_negated = s.guard_negated, d.i.text = &s.text;
    decoder(dots, d);
    if (!d.i.run) refuse(s, "no meaning for " + s.opcode);
    p.code.push_back(std::move(d.i));
  }
  first.back() = int(p.code.size());
  for (size_t n = 0; n < p.code.size(); ++n) {
    p.code[n].number = int(n);
    if (p.code[n].branches)
      p.code[n].offset = first[size_t(p.code[n].offset)];  // a statement becomes an instruction
  }
  return p;
}

inline uint64_t special(Special what, const int (&threads)[3]) {
  const emulator::Block& b = *emulator::current();
  const int id = emulator::self().id;
  switch (what) {
    case Special::tid_x: return id % threads[0];
    case Special::tid_y: return id / threads[0] % threads[1];
    case Special::tid_z: return id / threads[0] / threads[1];
    case Special::ntid_x: return threads[0];
    case Special::ntid_y: return threads[1];
    case Special::ntid_z: return threads[2];
    case Special::ctaid_x: return b.index[0];
    case Special::ctaid_y: return b.index[1];
    case Special::ctaid_z: return b.index[2];
    case Special::nctaid_x: return b.launch.grid[0];
    case Special::nctaid_y: return b.launch.grid[1];
    case Special::nctaid_z: return b.launch.grid[2];
    case Special::laneid: return id % 32;
  }
  return 0;
}

inline void run_thread(const Program& p, const std::vector<const uint8_t*>& parameters,
                       const int (&threads)[3]) {
  Frame f{p, parameters, {threads[0], threads[1], threads[2]}, {}, 0, {}, {}, {}, {}};
  f.r.assign(p.text.slots, ~0ull);  // NaN as a float, and no predicate
  f.visits.assign(p.code.size(), 0);
  for (auto& [slot, v] : p.text.constants) f.r[slot] = v;
  for (auto& [slot, what] : p.text.specials) f.r[slot] = special(what, threads);
  emulator::Thread& thread = emulator::self();
  while (f.pc < p.code.size()) {
    const Instruction& i = p.code[f.pc++];
    thread.at = i.text;
    if (++thread.steps > emulator::kLongest) fail("the thread does not end");
    if (i.guard >= 0 && f.get<bool>(i.guard) == i.guard_negated) continue;
    i.run(f, i);
  }
}

// `parameters[k]` points at the bytes of parameter k; `dynamic` is the shared memory the launch
// asks for.
inline void run(emulator::Launch& launch, const Program& p,
                const std::vector<const uint8_t*>& parameters, const int (&threads)[3],
                int dynamic) {
  const int all = threads[0] * threads[1] * threads[2];
  if (parameters.size() != p.text.parameters.size())
    throw Failure("ptx: " + std::to_string(parameters.size()) + " arguments for " +
                  std::to_string(p.text.parameters.size()) + " parameters");
  if (all > p.text.most_threads) throw Failure("ptx: more threads than the kernel is compiled for");
  const int shared =
      p.text.dynamic_shared.empty() ? p.text.static_shared : p.text.dynamic_at + dynamic;
  emulator::run(launch, all, shared, [&] { run_thread(p, parameters, threads); });
}

}  // namespace ptx
