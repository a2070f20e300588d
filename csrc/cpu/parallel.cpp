#include "cpu/parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/task_loop.h"

namespace mmkern {
namespace {

std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Scratch above this is freed after use instead of being kept by the thread.
constexpr size_t kKeptScratch = size_t{8} << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

int64_t num_threads() {
  return forked.load(std::memory_order_relaxed) ? 1 : torch::stable::get_num_threads();
}

void run_tasks(int64_t tasks, void (*fn)(void*, int64_t), void* context, size_t scratch) {
  const int64_t threads = std::min(num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(context, task);
    return;
  }
  TaskLoop loop(tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto reserve = [&] {
      if (scratch) thread_scratch(scratch);
    };
    loop.run(reserve, [&](int64_t task) { fn(context, task); });
  });
}

void await_turn(const int32_t* turn, int32_t value) { await(turn, value); }

void pass_turn(int32_t* turn, int32_t next) { pass(turn, next); }

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  const size_t rounded = (bytes + 4095) & ~size_t{4095};
  if (bytes > size || (size > kKeptScratch && rounded != size)) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, rounded));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

}  // namespace mmkern
