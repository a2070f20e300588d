// What threads do together: barriers, shuffles, matrices, mbarriers, tile copies, wgmma.
#pragma once
#include "ptx_memory.h"

namespace ptx {

inline void nothing(Frame&, const Instruction&) {}

// ---- barriers and fences ----

inline void decode_barrier(Dots& dots, Decoding& d) {  // bar and barrier
  const bool old = dots.name() == "bar";
  if (dots.take("warp")) {
    dots.want("sync");
    dots.end();
    d.refuse_operands(1);
    d.read(d.s.operands[0]);
    d.i.run = [](Frame& f, const Instruction& i) {
      emulator::warp_barrier(f.get<uint32_t>(i.a[0]));
    };
    return;
  }
  dots.take("cta");
  d.i.n = dots.one_of({"sync", "arrive"});
  if (!old && !dots.take("aligned"))
    refuse(dots.statement, "a barrier whose warps need not come whole");
  dots.end();
  if (d.s.operands.size() != 1 || d.i.n) d.refuse_operands(2);
  for (auto& o : d.s.operands) d.read(o);
  d.i.run = [](Frame& f, const Instruction& i) {
    const int id = int(f.r[i.a[0]]), all = int(emulator::current()->threads.size());
    if (id < 0 || id > 15) fail("barrier: id out of range");
    const int count = i.a.size() > 1 ? int(f.r[i.a[1]]) : all;
    i.n ? emulator::barrier_arrive(id, count) : emulator::barrier_sync(id, count);
  };
}

inline void decode_fence(Dots& dots, Decoding& d) {
  d.refuse_operands(0);
  d.i.run = nothing;
  if (dots.take("proxy")) {
    dots.want("async");
    if (!dots.take("shared::cta")) dots.take("global");
    d.i.run = [](Frame&, const Instruction&) { emulator::async_proxy_fence(); };
  } else if (dots.take("mbarrier_init")) {
    dots.want("release");
    dots.want("cluster");
  } else {
    dots.one_of({"sc", "acq_rel"});
    dots.one_of({"cta", "cluster", "gpu", "sys"});
  }
  dots.end();
}

// ---- shuffles, votes, reductions ----

inline void decode_shuffle(Dots& dots, Decoding& d) {
  dots.want("sync");
  d.i.n = dots.one_of({"bfly", "idx", "up", "down"});
  dots.want("b32");
  dots.end();
  d.refuse_operands(5);
  d.write(d.s.operands[0]);
  d.i.d.push_back(d.s.operands[0].second);
  for (int k = 1; k < 5; ++k) d.read(d.s.operands[k]);
  d.i.run = [](Frame& f, const Instruction& i) {
    const int by = int(f.r[i.a[1]] & 31), c = int(f.r[i.a[2]]), clamp = c & 31,
              segments = c >> 8 & 31;
    const int lane = emulator::lane(), most = (lane & segments) | (clamp & ~segments),
              least = lane & segments;
    int from = i.n == 0   ? lane ^ by
               : i.n == 1 ? least | (by & ~segments)
               : i.n == 2 ? lane - by
                          : lane + by;
    const bool inside = i.n == 2 ? from >= most : from <= most;
    const uint32_t v = emulator::shuffle(f.get<uint32_t>(i.a[3]), f.get<uint32_t>(i.a[0]), "shfl",
                                         [&](int) { return inside ? from : -1; });
    f.set(i.d[0], v);
    f.set<uint64_t>(i.d[1], inside);
  };
}
inline void decode_vote(Dots& dots, Decoding& d) {
  dots.want("sync");
  d.i.n = dots.one_of({"ballot", "any", "all"});
  dots.want(d.i.n ? "pred" : "b32");
  dots.end();
  d.plain(3);
  d.i.run = [](Frame& f, const Instruction& i) {
    const uint32_t mask = f.get<uint32_t>(i.a[1]),
                   mine = f.get<bool>(i.a[0]) ? 1u << emulator::lane() : 0;
    const uint32_t all =
        emulator::reduce(mask, mine, "vote", [](uint32_t a, uint32_t b) { return a | b; });
    if (i.n == 0) return f.set(i.d[0], all);
    f.set<uint64_t>(i.d[0], i.n == 1 ? all != 0 : all == mask);
  };
}
inline void decode_reduce(Dots& dots, Decoding& d) {  // redux
  dots.want("sync");
  d.i.n = dots.one_of({"add", "min", "max", "and", "or", "xor"});
  d.i.m = d.i.n > 2 ? (dots.want("b32"), 0) : dots.one_of({"u32", "s32"});
  dots.end();
  d.plain(3);
  d.i.run = [](Frame& f, const Instruction& i) {
    f.set(i.d[0], emulator::reduce(f.get<uint32_t>(i.a[1]), f.get<uint32_t>(i.a[0]), "redux",
                                   [&](uint32_t a, uint32_t b) {
                                     const bool less = i.m ? int32_t(a) < int32_t(b) : a < b;
                                     return i.n == 0   ? a + b
                                            : i.n == 1 ? (less ? a : b)
                                            : i.n == 2 ? (less ? b : a)
                                            : i.n == 3 ? a & b
                                            : i.n == 4 ? a | b
                                                       : a ^ b;
                                   }));
  };
}
inline void decode_elect(Dots& dots, Decoding& d) {
  dots.want("sync");
  dots.end();
  d.refuse_operands(2);
  d.i.d = {d.into(d.s.operands[0]), d.s.operands[0].second};
  d.read(d.s.operands[1]);
  d.i.run = [](Frame& f, const Instruction& i) {
    const int leader = __builtin_ctz(f.get<uint32_t>(i.a[0]));
    f.set(i.d[0], uint32_t(leader));
    f.set<uint64_t>(i.d[1], emulator::lane() == leader);
  };
}

// ---- 8x8 matrices and mma ----

inline void decode_matrix(Dots& dots, Decoding& d) {  // ldmatrix and stmatrix
  const bool load = dots.name() == "ldmatrix";
  dots.want("sync");
  dots.want("aligned");
  dots.want("m8n8");
  const size_t count = size_t(1) << dots.one_of({"x1", "x2", "x4"});
  d.i.n = dots.take("trans");
  if (!dots.take("shared::cta")) dots.want("shared");
  dots.want("b16");
  dots.end();
  d.refuse_operands(2);
  d.address(d.s.operands[load ? 1 : 0]);
  load ? d.write_all(d.s.operands[0]) : d.read_all(d.s.operands[1]);
  if ((load ? d.i.d.size() : d.i.a.size() - 1) != count)
    refuse(dots.statement, "number of registers");
  if (load)
    d.i.run = [](Frame& f, const Instruction& i) {
      uint32_t r[4];
      emulator::load_matrices(r, int(i.d.size()), smem(f.r[i.a[0]] + uint64_t(i.offset)), i.n);
      for (size_t k = 0; k < i.d.size(); ++k) f.set(i.d[k], r[k]);
    };
  else
    d.i.run = [](Frame& f, const Instruction& i) {
      uint32_t r[4];
      for (size_t k = 1; k < i.a.size(); ++k) r[k - 1] = f.get<uint32_t>(i.a[k]);
      emulator::store_matrices(r, int(i.a.size()) - 1, smem(f.r[i.a[0]] + uint64_t(i.offset)), i.n);
    };
}
inline void decode_mma(Dots& dots, Decoding& d) {
  for (const char* dot : {"sync", "aligned", "m16n8k16", "row", "col", "f32"}) dots.want(dot);
  d.i.n = dots.one_of({"f16", "bf16"});
  dots.want(d.i.n ? "bf16" : "f16");
  dots.want("f32");
  dots.end();
  d.refuse_operands(4);
  d.write_all(d.s.operands[0]);
  for (int k = 1; k < 4; ++k) d.read_all(d.s.operands[k]);
  if (d.i.d.size() != 4 || d.i.a.size() != 10) refuse(dots.statement, "number of registers");
  d.i.run = [](Frame& f, const Instruction& i) {
    uint32_t a[4], b[2];
    float c[4];
    for (int k = 0; k < 4; ++k) a[k] = f.get<uint32_t>(i.a[k]), c[k] = f.get<float>(i.a[6 + k]);
    for (int k = 0; k < 2; ++k) b[k] = f.get<uint32_t>(i.a[4 + k]);
    i.n ? emulator::multiply_16x8x16<bf16>(c, a, b) : emulator::multiply_16x8x16<f16>(c, a, b);
    for (int k = 0; k < 4; ++k) f.set(i.d[k], c[k]);
  };
}

// ---- mbarrier and tile copies ----

inline void decode_mbarrier(Dots& dots, Decoding& d) {
  const int what = dots.one_of({"init", "inval", "arrive", "expect_tx", "try_wait"});
  const bool expects = what == 2 && dots.take("expect_tx");
  if (what == 3) dots.want("relaxed"), dots.want("cta");
  if (what == 4) dots.want("parity");
  if (!dots.take("shared::cta")) dots.want("shared");
  dots.want("b64");
  dots.end();
  const auto& o = d.s.operands;
  const size_t at =
      what == 2 || what == 4 ? 1 : 0;  // arrive and try_wait have a result before the address
  d.refuse_operands(what == 1 ? 1 : what == 2 ? (expects ? 3 : 2) : what == 4 ? 3 : 2);
  if (what == 2 && o[0].kind != Operand::none) refuse(dots.statement, "the state of a phase");
  if (what == 4) d.write(o[0]);
  d.address(o[at]);
  if (o.size() > at + 1) d.read(o[at + 1]);
  d.i.n = expects;
  static constexpr auto where = [](const Frame& f, const Instruction& i) {
    return smem(f.r[i.a[0]] + uint64_t(i.offset));
  };
  switch (what) {
    case 0:
      d.i.run = [](Frame& f, const Instruction& i) {
        emulator::mbarrier_init(where(f, i), f.get<int>(i.a[1]));
      };
      break;
    case 1:
      d.i.run = [](Frame& f, const Instruction& i) { emulator::mbarrier_invalidate(where(f, i)); };
      break;
    case 2:
      d.i.run = [](Frame& f, const Instruction& i) {
        emulator::mbarrier_arrive(where(f, i), i.n ? f.get<int>(i.a[1]) : 0);
      };
      break;
    case 3:
      d.i.run = [](Frame& f, const Instruction& i) {
        emulator::mbarrier_expect(where(f, i), f.get<int>(i.a[1]));
      };
      break;
    default:
      d.i.run = [](Frame& f, const Instruction& i) {
        emulator::mbarrier_wait(where(f, i), f.get<int>(i.a[1]));
        f.set<uint64_t>(i.d[0], 1);
      };
  }
}
// cp.async.bulk.tensor, global to shared: [to], [map, {coordinates}], [mbarrier]
inline void decode_tile_copy(Dots& dots, Decoding& d) {
  dots.want("tensor");
  const size_t rank = size_t(dots.one_of({"1d", "2d", "3d", "4d", "5d"})) + 1;
  for (const char* dot : {"shared::cluster", "global"}) dots.want(dot);
  dots.take("tile");
  dots.want("mbarrier::complete_tx::bytes");
  dots.end();
  d.refuse_operands(3);
  d.address(d.s.operands[0]);
  const Operand &map = d.s.operands[1], &barrier = d.s.operands[2];
  if (d.i.offset || map.kind != Operand::address || map.offset ||
      barrier.kind != Operand::address || map.parts.size() != 1 ||
      map.parts[0].parts.size() != rank)
    refuse(dots.statement, "operands");
  d.i.a.push_back(map.slot);
  d.i.a.push_back(barrier.slot);
  d.i.offset = barrier.offset;
  d.read_all(map.parts[0]);
  d.i.run = [](Frame& f, const Instruction& i) {
    const uint64_t at = f.r[i.a[1]];
    const auto map = is_parameter(at) ? parameter_at(f, at, sizeof(emulator::TensorMap))
                                      : reinterpret_cast<const uint8_t*>(at);
    if (!is_parameter(at)) emulator::check_global(map, 1, "TMA: tensor map");
    emulator::TensorMap m;
    std::memcpy(static_cast<void*>(&m), map, sizeof m);
    int where[5] = {};
    for (size_t k = 3; k < i.a.size(); ++k) where[k - 3] = f.get<int>(i.a[k]);
    emulator::load_tile(smem(f.r[i.a[0]]), m, smem(f.r[i.a[2]] + uint64_t(i.offset)), where);
  };
}
inline void decode_cp(Dots& dots, Decoding& d) {
  dots.want("async");
  dots.take("bulk") ? decode_tile_copy(dots, d) : decode_copy_async(dots, d);
}

// ---- wgmma ----

inline void wgmma_wait(Frame& f, int left) {
  emulator::wgmma_wait(left);
  for (; f.reading_groups.size() > size_t(left); f.reading_groups.pop_front())
    for (auto& [slot, held] : f.reading_groups.front())
      if (f.get<uint32_t>(slot) != held) fail("wgmma: register operand changed before the wait");
  for (auto& entry : f.accumulators) {  // finished accumulators come back to their registers
    Accumulators& acc = *entry.second;
    if (!acc.away || emulator::warpgroup().busy.count(acc.values.data())) continue;
    for (size_t k = 0; k < acc.values.size(); ++k) f.set(acc.slots[k], acc.values[k]);
    acc.away = false;
  }
}
inline void run_wgmma(Frame& f, const Instruction& i) {
  auto& held = f.accumulators[i.d];
  if (!held) {
    held = std::make_unique<Accumulators>();
    held->slots = i.d;
    held->values.resize(i.d.size());
  }
  if (!held->away) {
    held->away = true;
    for (size_t k = 0; k < i.d.size(); ++k) {
      held->values[k] = f.get<float>(i.d[k]);
      f.r[i.d[k]] = ~0ull;
    }
  }
  const bool registers = i.m & 4, bf = i.m & 8;
  uint32_t a[4] = {};
  uint64_t a_desc = 0;
  size_t next = 0;
  if (registers)
    for (; next < 4; ++next) {
      a[next] = f.get<uint32_t>(i.a[next]);
      f.reading.emplace_back(i.a[next], a[next]);
    }
  else
    a_desc = f.r[i.a[next++]];
  const uint64_t b_desc = f.r[i.a[next++]];
  const bool add = f.r[i.a[next]] & 1;
  auto go = bf ? &emulator::wgmma<bf16> : &emulator::wgmma<f16>;
  go(held->values.data(), i.n, registers ? a : nullptr, a_desc, b_desc, add, i.m & 1, i.m & 2,
     false);
}
inline void decode_wgmma(Dots& dots, Decoding& d) {
  const int what = dots.one_of({"fence", "commit_group", "wait_group", "mma_async"});
  dots.want("sync");
  dots.want("aligned");
  if (what == 0) d.i.run = [](Frame&, const Instruction&) { emulator::wgmma_fence(); };
  if (what == 1)
    d.i.run = [](Frame& f, const Instruction&) {
      f.reading_groups.push_back(std::move(f.reading));
      f.reading.clear();
      emulator::wgmma_commit();
    };
  if (what == 2) {
    d.refuse_operands(1);
    d.read(d.s.operands[0]);
    d.i.run = [](Frame& f, const Instruction& i) { wgmma_wait(f, int(f.r[i.a[0]])); };
  }
  if (what != 3) {
    if (what < 2) d.refuse_operands(0);
    return dots.end();
  }
  const std::string shape = dots.next();  // m64nNk16
  int n = 0, used = 0;
  if (sscanf(shape.c_str(), "m64n%dk16%n", &n, &used) != 1 || used != int(shape.size()) || n % 8 ||
      n < 8 || n > 256)
    refuse(dots.statement, "shape ." + shape);
  dots.want("f32");
  const int bf = dots.one_of({"f16", "bf16"});
  dots.want(bf ? "bf16" : "f16");
  dots.end();
  const auto& o = d.s.operands;  // d, a, b, scale-d, scale-a, scale-b, [transpose a,] transpose b
  const bool registers = o.size() > 1 && o[1].kind == Operand::vector;
  d.refuse_operands(registers ? 7 : 8);
  d.write_all(o[0]);
  if (int(d.i.d.size()) != n / 2 || (registers && o[1].parts.size() != 4))
    refuse(dots.statement, "number of registers");
  d.read_all(o[1]);
  d.read(o[2]);
  d.read(o[3]);
  auto constant = [&](const Operand& x) {
    const auto found = d.program.text.constants.find(x.slot);
    if (found == d.program.text.constants.end())
      refuse(dots.statement, "expected a number, got " + x.text);
    return int(found->second);
  };
  if (constant(o[4]) != 1 || constant(o[5]) != 1) refuse(dots.statement, "a negated operand");
  const int a_transposed = registers ? 0 : constant(o[6]), b_transposed = constant(o.back());
  d.i.n = n;
  d.i.m = a_transposed | b_transposed << 1 | registers << 2 | bf << 3;
  d.i.run = run_wgmma;
}
inline void decode_registers(Dots& dots, Decoding& d) {  // setmaxnreg
  d.i.n = dots.one_of({"dec", "inc"});
  for (const char* dot : {"sync", "aligned", "u32"}) dots.want(dot);
  dots.end();
  d.refuse_operands(1);
  d.read(d.s.operands[0]);
  d.i.run = [](Frame& f, const Instruction& i) { emulator::set_registers(int(f.r[i.a[0]]), i.n); };
}

inline const Decoders& warp_decoders() {
  static const Decoders all = {
      {"bar", decode_barrier},  {"barrier", decode_barrier},     {"fence", decode_fence},
      {"shfl", decode_shuffle}, {"vote", decode_vote},           {"redux", decode_reduce},
      {"elect", decode_elect},  {"ldmatrix", decode_matrix},     {"stmatrix", decode_matrix},
      {"mma", decode_mma},      {"mbarrier", decode_mbarrier},   {"cp", decode_cp},
      {"wgmma", decode_wgmma},  {"setmaxnreg", decode_registers}};
  return all;
}

}  // namespace ptx
