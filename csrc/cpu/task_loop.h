// How tasks are handed out and take turns: what parallel.cpp runs on torch's threads, without
// torch, so that ThreadSanitizer can watch it (tests/turns_race.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/parallel.h"

namespace mmkern {

// Hands out tasks [0, tasks) in order to each thread that runs it, after that thread has reserved
// the memory of a task. One that cannot throws before it has taken any, and the others do all:
// within a task it would leave those that wait for its turn waiting for ever.
class TaskLoop {
  std::atomic<int64_t> next_{0};
  const int64_t tasks_;

 public:
  explicit TaskLoop(int64_t tasks) : tasks_(tasks) {}
  template <class R, class F>
  void run(const R& reserve, const F& f) {
    reserve();
    for (int64_t task = next_++; task < tasks_; task = next_++) f(task);
  }
};

inline void await(const int32_t* turn, int32_t value) {
  // Another thread is at most one block ahead: some ten microseconds. Where there are more threads
  // than cores it may not be running at all: let it.
  for (int looked = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != value; ++looked) {
    if (looked > 1000) std::this_thread::yield();
  }
}

inline void pass(int32_t* turn, int32_t next) { __atomic_store_n(turn, next, __ATOMIC_RELEASE); }

}  // namespace mmkern
