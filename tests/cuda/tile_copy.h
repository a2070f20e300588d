// mbarriers, and the tile copies (TMA) that report to them.
#pragma once
#include "memory.h"

namespace emulator {

struct MBarrier {
  int count = 0, pending = 0, phase = 0, agent = 0, creator = -1;
  uint32_t created = 0;
  int64_t bytes = 0;  // expected and not yet there
  Clock open, closed, open_fenced,
      closed_fenced;  // what the arrivals of this phase and of the last one have seen
};

// What cuTensorMapEncodeTiled is given. 128 bytes, as the driver's own map, but readable.
struct alignas(64) TensorMap {
  const uint8_t* base;
  int64_t size[5], stride[5];  // elements; bytes, stride[0] being an element's
  int16_t box[5];              // elements; 0: no such dimension
  uint8_t element,
      swizzle;  // bytes of an element; bytes of a swizzled row: 128, 64, 32, or 0 for none
};
static_assert(sizeof(TensorMap) == 128);

struct TileCopy {
  TensorMap map;
  smem to, barrier;
  int at[5];
  Clock seen;
};

inline void mbarrier_init(smem a, int arrivals) {
  check_shared(a, 8, "mbarrier.init");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier.init: count out of range");
  Later& later = *current()->later;
  MBarrier m;
  m.count = m.pending = arrivals;
  m.creator = self().id;
  m.created = self().clock[m.creator];
  m.agent = later.agents++;
  if (later.agents > kAgents) fail("emulator: raise kAgents");
  later.barriers[a] = m;
}
inline void mbarrier_invalidate(smem a) {
  if (!current()->later->barriers.erase(a)) fail("mbarrier.inval: none at " + place(a));
}
inline MBarrier& mbarrier_at(smem a) {
  auto& all = current()->later->barriers;
  const auto found = all.find(a);
  if (found == all.end()) fail("mbarrier at " + place(a) + " is not initialised");
  MBarrier& m = found->second;
  if (m.creator != self().id && self().clock[m.creator] < m.created)
    fail("mbarrier used with no barrier after its init");
  return m;
}
inline void finish_phase(Block& b, MBarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  m.closed = std::move(m.open);
  m.closed_fenced = std::move(m.open_fenced);
  m.open.clear();
  m.open_fenced.clear();
  m.pending = m.count;
  ++m.phase;
  ++b.progress;
}
inline void mbarrier_expect(smem a, int bytes) { mbarrier_at(a).bytes += bytes; }
inline void mbarrier_arrive(smem a, int bytes) {
  MBarrier& m = mbarrier_at(a);
  m.bytes += bytes;
  if (--m.pending < 0) fail("more arrivals than the mbarrier counts");
  join(m.open, self().clock);
  join(m.open_fenced, self().fenced);
  ++self().clock[self().id];
  ++current()->progress;
  finish_phase(*current(), m);
}
inline void mbarrier_wait(smem a, int parity) {
  MBarrier& m = mbarrier_at(a);
  while ((m.phase & 1) == parity) yield("mbarrier wait");
  join(self().clock, m.closed);
  join(self().fenced, m.closed_fenced);
  ++current()->progress;
}
// Everything this thread has seen becomes visible to tile copies and wgmma.
inline void async_proxy_fence() { join(self().fenced, self().clock); }

// Address bits 4.. are xored with bits 7..: a row of 128, 64 or 32 bytes shifts its 16-byte units.
inline smem swizzled(smem a, int bytes) {
  if (bytes == 0) return a;
  return a ^ ((a >> 7 & (bytes / 16 - 1)) << 4);
}

inline void deliver(Block& b, size_t which) {
  TileCopy c = b.later->copies[which];
  b.later->copies.erase(b.later->copies.begin() + which);
  const TensorMap& m = c.map;
  MBarrier& bar = b.later->barriers.at(c.barrier);
  const int agent = int(b.threads.size()) + bar.agent;
  const uint32_t time = ++b.later->agent_time[bar.agent];
  int64_t count = 1, bytes = 0;
  for (int d = 0; d < 5 && m.box[d]; ++d) count *= m.box[d];
  for (int64_t n = 0; n < count; ++n, bytes += m.element) {
    const uint8_t* from = m.base;
    bool inside = true;
    int64_t left = n;
    for (int d = 0; d < 5 && m.box[d]; ++d) {
      const int64_t at = c.at[d] + left % m.box[d];
      left /= m.box[d];
      inside = inside && at >= 0 && at < m.size[d];
      from += at * m.stride[d];
    }
    const smem to = swizzled(c.to + smem(bytes), m.swizzle);
    if (inside)
      std::memcpy(b.shared.data() + to, from, m.element);
    else
      std::memset(b.shared.data() + to, 0,
                  m.element);  // what is outside of the tensor reads as zero
    each_shadow(to / 4 * 4, 4, [&](Shadow& s, smem, int) {
      s.landing = -1, s.writer = agent, s.written = time, s.generic = false;
    });
  }
  c.seen.resize(b.threads.size() + kAgents, 0);
  c.seen[agent] = std::max(c.seen[agent], time);
  join(bar.open, c.seen);
  bar.bytes -= bytes;
  ++b.progress;
  finish_phase(b, bar);
}

inline void check_map(const TensorMap& m) {
  if (m.element != 1 && m.element != 2 && m.element != 4 && m.element != 8)
    fail("TMA: this is no tensor map");
  if (reinterpret_cast<uintptr_t>(m.base) % 16) fail("TMA: misaligned base");
  if (m.swizzle && m.box[0] * m.element > m.swizzle) fail("TMA: inner box wider than the swizzle");
  if (m.box[0] * m.element % 16) fail("TMA: inner box is no multiple of 16 bytes");
  if (m.stride[0] != m.element) fail("TMA: the inner dimension must be contiguous");
  for (int d = 0; d < 5 && m.box[d]; ++d) {
    if (m.box[d] > 256) fail("TMA: box longer than 256");
    if (d && m.stride[d] % 16) fail("TMA: global strides must be multiples of 16 bytes");
    if (m.size[d] < 1 || m.size[d] > int64_t(1) << 32) fail("TMA: size out of range");
  }
}

inline void load_tile(smem to, const TensorMap& m, smem barrier, const int (&at)[5]) {
  Block& b = *current();
  MBarrier& bar = mbarrier_at(barrier);
  check_map(m);
  int bytes = m.element;
  for (int d = 0; d < 5 && m.box[d]; ++d) bytes *= m.box[d];
  if (to % (m.swizzle ? m.swizzle * 8 : 128))
    fail("TMA: a tile must start where its swizzle pattern does");
  if (uint64_t(to) + bytes > b.shared.size()) fail("TMA: box out of shared memory");
  for (int i = 0; i < bytes; i += 4) {
    each_shadow(to + i, 4, [](Shadow& s, smem, int) {
      if (s.landing >= 0) fail("TMA: two loads under way to one place");
    });
    note_write(to + i, 4, "TMA");
    each_shadow(to + i, 4,
                [&](Shadow& s, smem, int) { s.landing = int(b.threads.size()) + bar.agent; });
  }
  b.later->copies.push_back({m, to, barrier, {at[0], at[1], at[2], at[3], at[4]}, self().clock});
  ++self().clock[self().id];
  if (b.launch.eager) deliver(b, b.later->copies.size() - 1);
}

}  // namespace emulator
