// wgmma: 128 threads multiply from shared memory while they go on. Descriptors are decoded from
// their 64 bits; until wait_group the accumulators are NaN and the operands count as being read.
// setmaxnreg is checked against 64 K registers.
#pragma once
#include "tile_copy.h"

namespace emulator {

struct Product {
  std::vector<float*> c;  // n / 2 floats of each thread
  std::vector<float>
      saved;  // what they held at issue; empty where an earlier product under way holds them
  std::vector<uint32_t> a;               // register operand, 4 a thread, or empty
  std::vector<const uint32_t*> a_where;  // where it was, if that must still hold it at the wait
  uint64_t a_desc = 0, b_desc = 0;
  int n = 64;
  bool add = true, a_transposed = false, b_transposed = false;
  void (*run)(Product&) = nullptr;
};
struct Warpgroup {
  Collective meeting;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<uint32_t> group_time;
  std::set<float*> busy;  // accumulators of products under way
  uint32_t time = 0;
  int registers = 0;
};

inline Warpgroup& warpgroup() { return current()->later->groups[self().id / 128]; }
template <class Work>
void meet_group(void* argument, const char* name, Work work) {
  meet(warpgroup().meeting, 128, self().id % 128, 128, argument, name, work);
}

// PTX ISA, "Matrix descriptor format": start, leading and stride offsets in 16 bytes, base offset,
// swizzle.
struct Descriptor {
  smem start, leading, stride;
  int base_offset, swizzle;
  explicit Descriptor(uint64_t d)
      : start(smem(d & 0x3fff) << 4),
        leading(smem(d >> 16 & 0x3fff) << 4),
        stride(smem(d >> 32 & 0x3fff) << 4),
        base_offset(int(d >> 49 & 7)) {
    const int mode = int(d >> 62);
    swizzle = mode == 0 ? 0 : 256 >> mode;
  }
  void check() const {
    if (swizzle == 0) fail("wgmma: descriptors without a swizzle are not modelled");
    if (base_offset || (start >> 7 & (swizzle / 16 - 1)))
      fail("wgmma: operand does not start where the swizzle pattern does");
  }
  // Element k of row mn. Eight rows of `swizzle` bytes are an atom; transposed: rows are
  // contiguous, K steps over lines.
  smem at(bool transposed, int mn, int k) const {
    const int line = swizzle / 2;  // elements
    const smem a =
        transposed ? start + mn / line * leading + k / 8 * stride + k % 8 * swizzle + mn % line * 2
                   : start + mn / 8 * stride + mn % 8 * swizzle + k * 2;
    return swizzled(a, swizzle);
  }
};

template <class T>
void execute(Product& op) {
  static thread_local float A[64][16], B[16][256];
  auto operand = [](uint64_t desc, bool transposed, int mn, int k) {
    T x;
    std::memcpy(&x, shared_at(Descriptor(desc).at(transposed, mn, k)), 2);
    return value(x);
  };
  for (int n = 0; n < op.n; ++n)
    for (int k = 0; k < 16; ++k) B[k][n] = operand(op.b_desc, op.b_transposed, n, k);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) {
      const int thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2, which = m % 16 / 8 + k / 8 * 2;
      A[m][k] = op.a.empty() ? operand(op.a_desc, op.a_transposed, m, k)
                             : half_of<T>(op.a[thread * 4 + which], k % 2);
    }
  for (size_t t = 0; t < op.a_where.size(); ++t)
    if (std::memcmp(op.a_where[t], &op.a[t * 4], 16))
      fail("wgmma: register operand changed before the wait");
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < op.n / 2; ++i) {
      const int m = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
      double sum = !op.add ? 0.0 : op.saved.empty() ? op.c[t][i] : op.saved[t * (op.n / 2) + i];
      for (int k = 0; k < 16; ++k) sum += double(A[m][k]) * B[k][n];
      op.c[t][i] = float(sum);
    }
  ++current()->launch.products;
}

struct ProductCall {  // one thread's part
  float* c;
  const uint32_t* a;
  uint64_t a_desc, b_desc;
  int thread;
};

// Every word of an operand must be there for all 128 threads, and is being read until the wait.
inline void read_operand(const Descriptor& d, bool transposed, int rows, const Clock& least,
                         const Clock& fenced) {
  Block& b = *current();
  const int agent = int(b.threads.size()) + self().id / 128;
  for (int mn = 0; mn < rows; mn += transposed ? 2 : 1)
    for (int k = 0; k < 16; k += transposed ? 1 : 2) {
      const smem at = d.at(transposed, mn, k);
      check_shared(at, 4, "wgmma");
      each_shadow(at, 4, [&](Shadow& s, smem byte, int) {
        if (s.landing >= 0) fail("wgmma reads " + place(byte) + " while its tile is under way");
        if (s.writer >= 0 && least[s.writer] < s.written)
          fail("wgmma reads " + place(byte) + " that not all its threads waited for");
        if (s.generic && fenced[s.writer] < s.written)
          fail("wgmma reads " + place(byte) + ", stored by thread " + std::to_string(s.writer) +
               " with no fence.proxy.async since");
        remember_read(s, agent, warpgroup().time);
      });
    }
}

template <class T>
void wgmma(float* c, int n, const uint32_t* a, uint64_t a_desc, uint64_t b_desc, bool add,
           bool a_transposed, bool b_transposed, bool a_stays = true) {
  ProductCall mine{c, a, a_desc, b_desc, self().id};
  if (!self().wgmma_fenced) fail("wgmma without wgmma.fence after its registers were touched");
  meet_group(&mine, a ? "wgmma.rs" : "wgmma.ss", [&](std::vector<void*>& all) {
    Block& b = *current();
    Warpgroup& g = warpgroup();
    Product op;
    op.run = &execute<T>;
    op.n = n;
    op.a_desc = a_desc, op.b_desc = b_desc, op.add = add, op.a_transposed = a_transposed,
    op.b_transposed = b_transposed;
    const bool chained = g.busy.count(c) != 0;
    Clock least = self().clock, fenced = self().fenced;  // what every one of the threads has seen
    fenced.resize(least.size(), 0);
    for (void* p : all) {
      auto m = static_cast<ProductCall*>(p);
      if (m->a_desc != a_desc || m->b_desc != b_desc)
        fail("wgmma: threads give different descriptors");
      op.c.push_back(m->c);
      if (a) op.a.insert(op.a.end(), m->a, m->a + 4);
      if (a && a_stays) op.a_where.push_back(m->a);
      if (!chained) op.saved.insert(op.saved.end(), m->c, m->c + n / 2);
      std::fill(m->c, m->c + n / 2, __builtin_nanf(""));
      const Clock &k = b.threads[m->thread].clock, &f = b.threads[m->thread].fenced;
      for (size_t i = 0; i < least.size(); ++i) {
        if (int(i) != m->thread) least[i] = std::min(least[i], k[i]);
        fenced[i] = std::min(fenced[i], i < f.size() ? f[i] : 0);
      }
    }
    for (void* p : all) g.busy.insert(static_cast<ProductCall*>(p)->c);
    g.time = ++b.later->agent_time[self().id / 128];
    Descriptor(b_desc).check();
    read_operand(Descriptor(b_desc), b_transposed, n, least, fenced);
    if (!a) {
      Descriptor(a_desc).check();
      read_operand(Descriptor(a_desc), a_transposed, 64, least, fenced);
    }
    g.open.push_back(std::move(op));
  });
}
inline void wgmma_fence() { self().wgmma_fenced = true; }
inline void wgmma_commit() {
  self().wgmma_fenced = false;
  meet_group(nullptr, "wgmma.commit_group", [](std::vector<void*>&) {
    Warpgroup& g = warpgroup();
    g.groups.push_back(std::move(g.open));
    g.open.clear();
    g.group_time.push_back(g.time);
  });
}
inline void wgmma_wait(int left) {
  meet_group(nullptr, "wgmma.wait_group", [&](std::vector<void*>&) {
    Block& b = *current();
    Warpgroup& g = warpgroup();
    while (g.groups.size() > size_t(left)) {
      for (Product& op : g.groups.front()) op.run(op);
      const int agent = int(b.threads.size()) + self().id / 128, first = self().id / 128 * 128;
      for (int t = first; t < first + 128; ++t)
        b.threads[t].clock[agent] = std::max(b.threads[t].clock[agent], g.group_time.front());
      g.groups.erase(g.groups.begin());
      g.group_time.erase(g.group_time.begin());
    }
    g.busy.clear();
    for (auto& group : g.groups)
      for (auto& op : group) g.busy.insert(op.c.begin(), op.c.end());
  });
}

// setmaxnreg: an increase waits until the block's other warpgroups have given registers back.
inline void set_registers(int n, bool up) {
  meet_group(nullptr, "setmaxnreg", [&](std::vector<void*>&) {
    Warpgroup& g = warpgroup();
    if (n % 8 || n < 24 || n > 256) fail("setmaxnreg: count not a multiple of 8 in 24..256");
    if (up ? n < g.registers : n > g.registers) fail("setmaxnreg: wrong direction");
    g.registers = n;
  });
  while (up) {
    int sum = 0;
    for (auto& g : current()->later->groups) sum += g.registers * 128;
    if (sum <= 65536) break;
    yield("setmaxnreg.inc");
  }
}

}  // namespace emulator
