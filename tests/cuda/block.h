// A block of CUDA threads on the CPU: fibers, what each has seen of the others, and how they wait
// for one another.
//
// Blocks run one after another. Every thread has a vector clock: for each other thread, the latest
// moment of it that some barrier has ordered before now. Two accesses to one place that no barrier
// orders are then found whatever the order in which they happened to run.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"
#include "formats.h"

namespace emulator {

using smem = uint32_t;  // a byte address in the block's shared memory
using Clock = std::vector<uint32_t>;

constexpr int kAgents =
    64;  // clocks of what runs beside the threads: tile copies and products under way
constexpr uint64_t kLongest =
    4'000'000;  // instructions of a thread, after which it is held to be caught in a loop

struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};
struct Stop {};  // unwinds a fiber once its block has failed

struct Buffer {
  const uint8_t* first;
  size_t size;
};

struct GlobalWord {  // what is known of 4 bytes of global memory
  int block = -1, writer = -1, reader_block = -1, reader = -1;
  uint32_t written = 0, read = 0;
};

struct Launch {
  std::vector<Buffer> buffers;  // what the kernel may touch
  int grid[3] = {1, 1, 1};
  unsigned order = 0;  // seed of the order in which threads run; 0: as they are numbered
  bool eager = false;  // tile copies land at once, not as late as can be
  bool strict_proxies =
      false;  // want a proxy fence after cp.async, too: the letter of the PTX ISA, not the practice
  // Lanes of a warp may store, with one instruction, floats that differ in their last bits to one
  // place. Triton has lanes that hold copies of one sum; where a product is fused into the first
  // addition, each lane rounds its own, and the hardware keeps that of an unspecified lane.
  bool ties = false;
  uint64_t tied = 0;
  uint64_t switches = 0, matrix_loads = 0, matrix_conflicts = 0, shared_conflicts = 0, products = 0;
  std::unordered_map<uintptr_t, GlobalWord> global;
};

struct Shadow {     // what is known of 4 bytes of shared memory; of one, where threads share a word
  int writer = -1;  // who wrote it last, and when
  uint32_t written = 0;
  bool generic = false;             // by an ordinary store or cp.async, not by a tile copy
  const std::string* at = nullptr;  // the instruction that did, where there are instructions
  int landing = -1;                 // whose asynchronous copy will write it
  bool was_read = false;            // since it was last written; then `reads` holds when, by thread
  std::vector<uint32_t> reads;
  std::unique_ptr<std::array<Shadow, 4>> bytes;
};

struct Collective {  // a meeting of some threads; the last to come does the work of all
  std::vector<void*> arguments;
  int arrived = 0;
  uint64_t generation = 0;
  std::string name;
};

struct Barrier {  // one of the 16 hardware barriers
  int count = 0;
  uint64_t generation = 0;
  std::vector<int> waiting;
  int arrived = 0;
  Clock seen, fenced;
};

struct Copy {
  smem to;
  uint8_t data[16];
  int bytes;
};

struct Thread {
  int id = 0;
  bool done = false;
  const char* waits = "";
  Clock clock,
      fenced;  // what it has seen; what of that a proxy fence showed to tile copies and wgmma
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies
  std::vector<Copy> open;                 // not yet committed
  bool wgmma_fenced = false;
  uint64_t steps = 0;
  const std::string* at = nullptr;  // the instruction it runs, where there are instructions
  Fiber context;
  std::unique_ptr<char[]> stack;
};

struct MBarrier;   // barrier.h
struct TileCopy;   // tile_copy.h
struct Warpgroup;  // wgmma.h
struct Later {     // what those hold of a block; made and destroyed where they are known
  std::map<smem, MBarrier> barriers;
  std::vector<TileCopy> copies;
  std::vector<Warpgroup> groups;
  uint32_t agent_time[kAgents] = {};
  int agents = 0;
};

struct Block {
  Launch& launch;
  int index[3];
  std::vector<uint8_t> shared;
  std::vector<Shadow> shadows;
  std::vector<Thread> threads;
  std::vector<std::map<uint32_t, Collective>> warps;  // by the mask of the lanes that meet
  std::array<Barrier, 16> barriers;
  std::shared_ptr<Later> later;
  // addresses of one warp at one instruction, the n-th time: for bank conflicts
  std::map<std::tuple<int, int, uint64_t>, std::vector<std::pair<smem, int>>> warp_accesses;
  Fiber scheduler;
  Thread* now = nullptr;
  uint64_t progress = 0;
  std::string error;
  bool stopping = false;
  std::function<void()> body;

  Block(Launch& of, int n)
      : launch(of),
        index{n % of.grid[0], n / of.grid[0] % of.grid[1], n / of.grid[0] / of.grid[1]} {}
  int number() const { return index[0] + launch.grid[0] * (index[1] + launch.grid[1] * index[2]); }
};

inline Block*& current() {
  static thread_local Block* block = nullptr;
  return block;
}
inline Thread& self() { return *current()->now; }
inline int lane() { return self().id % 32; }

[[noreturn]] inline void fail(const std::string& what) {
  Block& b = *current();
  if (b.error.empty())
    b.error = what + " (block " + std::to_string(b.index[0]) + "," + std::to_string(b.index[1]) +
              " thread " + std::to_string(self().id) +
              (self().at ? ", `" + *self().at + "`)" : ")");
  throw Stop{};
}

inline void yield(const char* why) {
  Block& b = *current();
  b.now->waits = why;
  switch_fiber(b.now->context, b.scheduler);
  if (b.stopping) throw Stop{};
}

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// `count` threads must come with the same `name`; `work` runs once, in the last. `place` orders the
// arguments.
template <class Work>
void meet(Collective& c, size_t places, size_t place, int count, void* argument, const char* name,
          Work work) {
  if (c.arguments.size() != places) c.arguments.assign(places, nullptr);
  if (c.arrived == 0) {
    c.name = name;
    std::fill(c.arguments.begin(), c.arguments.end(), nullptr);
  }
  if (c.name != name) fail("threads diverge: " + c.name + " meets " + name);
  c.arguments[place] = argument;
  ++current()->progress;
  if (++c.arrived == count) {
    work(c.arguments);
    c.arrived = 0;
    ++c.generation;
    return;
  }
  for (const uint64_t mine = c.generation; c.generation == mine;) yield(name);
}

// The lanes of `mask` meet. work(arguments): by lane, null where a lane takes no part.
template <class Work>
void meet_warp(uint32_t mask, void* argument, const char* name, Work work) {
  if (!(mask >> lane() & 1)) fail(std::string(name) + ": the lane is not in its own mask");
  Collective& c = current()->warps[self().id / 32][mask];
  meet(c, 32, lane(), __builtin_popcount(mask), argument, name, work);
}

inline void check_barrier(int id, int count) {
  Barrier& bar = current()->barriers.at(id);
  if (count % 32 || count <= 0 || count > int(current()->threads.size()))
    fail("barrier: " + std::to_string(count) +
         " threads, which is no number of whole warps of the block");
  if (bar.count && bar.count != count) fail("barrier: threads expect different numbers of threads");
  bar.count = count;
}

// Adds the thread to the barrier; once all are there, everyone that waits has seen what every one
// of them had.
inline void join_barrier(int id, bool waits) {
  Block& b = *current();
  Barrier& bar = b.barriers[id];
  Thread& t = self();
  join(bar.seen, t.clock);
  join(bar.fenced, t.fenced);
  ++t.clock[t.id];
  ++b.progress;
  if (waits) bar.waiting.push_back(t.id);
  if (++bar.arrived == bar.count) {
    for (int w : bar.waiting) {
      join(b.threads[w].clock, bar.seen);
      join(b.threads[w].fenced, bar.fenced);
    }
    const uint64_t generation = bar.generation + 1;
    bar = Barrier();
    bar.generation = generation;
  }
}
inline void barrier_arrive(int id, int count) {
  check_barrier(id, count);
  join_barrier(id, false);
}
inline void barrier_sync(int id, int count) {
  check_barrier(id, count);
  Barrier& bar = current()->barriers[id];
  const uint64_t mine = bar.generation;
  join_barrier(id, true);
  while (bar.generation == mine) yield("barrier");
}
inline void block_barrier() { barrier_sync(0, int(current()->threads.size())); }

inline void warp_barrier(uint32_t mask) {
  meet_warp(mask, &self(), "warp barrier", [](std::vector<void*>& all) {
    Clock seen, fenced;
    for (void* p : all)
      if (p)
        join(seen, static_cast<Thread*>(p)->clock), join(fenced, static_cast<Thread*>(p)->fenced);
    for (void* p : all) {
      if (!p) continue;
      auto& t = *static_cast<Thread*>(p);
      t.clock = seen, t.fenced = fenced;
      ++t.clock[t.id];
    }
  });
}

}  // namespace emulator
