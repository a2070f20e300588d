// Runs a grid: blocks one after another, the threads of a block in turns until each is done or none
// can go on.
#pragma once
#include "warp.h"
#include "wgmma.h"

namespace emulator {

inline void thread_entry() {
  Block& b = *current();
  Thread& me = *b.now;
  try {
    b.body();
    if (!me.open.empty() || !me.groups.empty())
      fail("thread ends with asynchronous copies under way");
  } catch (const Stop&) {
  } catch (const std::exception& e) {
    if (b.error.empty()) b.error = e.what();
  }
  b.now = &me;
  me.done = true;
  ++b.progress;
  for (;;) switch_fiber(me.context, b.scheduler);
}

// Whole warps in another order for each seed, their lanes reversed for odd ones.
inline std::vector<int> thread_order(int threads, unsigned seed) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  auto key = [&](int i) {
    const int in_warp = seed & 1 ? 31 - i % 32 : i % 32;
    return (uint64_t(i / 32 + 1) * 2654435761u * seed) % 1000003u * 32 + in_warp;
  };
  if (seed) std::sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  return order;
}

inline std::string deadlock(const Block& b) {
  std::map<std::string, int> waits;
  for (const Thread& t : b.threads)
    if (!t.done) ++waits[t.waits];
  std::string what = "deadlock:";
  for (auto& w : waits)
    what += " " + std::to_string(w.second) + " threads wait in " + w.first + ";";
  return what;
}

inline void run_block(Block& b) {
  const std::vector<int> order = thread_order(int(b.threads.size()), b.launch.order);
  for (bool alive = true; alive;) {
    alive = false;
    const uint64_t before = b.progress;
    for (int i : order) {
      Thread& t = b.threads[i];
      if (t.done) continue;
      alive = true;
      b.now = &t;
      ++b.launch.switches;
      switch_fiber(b.scheduler, t.context);
      if (!b.error.empty()) b.stopping = true;  // the others unwind at their next turn
    }
    if (!alive || before != b.progress || b.stopping) continue;
    auto& copies = b.later->copies;
    if (!copies.empty()) {  // a tile lands when nobody can go on without one: as late as can be
      const uint64_t seed = b.launch.order;
      deliver(b, seed ? (seed * 7919u + b.launch.switches) % copies.size() : 0);
    } else {
      b.error = deadlock(b);
      b.stopping = true;
    }
  }
}

// `body` is what one thread does. Throws Failure with the first error.
inline void run(Launch& launch, int threads, int shared_bytes, const std::function<void()>& body) {
  constexpr size_t kStack = 64 << 10;
  if (threads < 1 || threads > 1024)
    throw Failure("launch: " + std::to_string(threads) + " threads in a block");
  std::vector<std::unique_ptr<char[]>> stacks(threads);
  for (auto& s : stacks) s.reset(new char[kStack]);
  const int blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
  for (int n = 0; n < blocks; ++n) {
    Block b(launch, n);
    b.shared.assign(shared_bytes, 0xff);  // NaN in every float format
    b.shadows = std::vector<Shadow>((shared_bytes + 3) / 4);
    b.threads = std::vector<Thread>(threads);
    b.warps.resize((threads + 31) / 32);
    b.later = std::make_shared<Later>();
    b.later->groups.resize((threads + 127) / 128);
    b.later->agents = int(b.later->groups.size());  // the first agents are the warpgroups' products
    for (auto& g : b.later->groups) g.registers = std::min(65536 / threads / 8 * 8, 255);
    b.body = body;
    current() = &b;
    for (int i = 0; i < threads; ++i) {
      Thread& t = b.threads[i];
      t.id = i;
      t.clock.assign(threads + kAgents, 0);
      t.clock[i] = 1;
      t.stack = std::move(stacks[i]);
      start_fiber(t.context, t.stack.get(), kStack, thread_entry);
    }
    run_block(b);
    count_remaining_conflicts(b);
    for (int i = 0; i < threads; ++i) stacks[i] = std::move(b.threads[i].stack);
    current() = nullptr;
    if (!b.error.empty()) throw Failure(b.error);
  }
}

}  // namespace emulator
