// Threads and scratch memory for kernels. Plain functions only: this header is included by code
// compiled for several instruction sets, and a template of the standard library instantiated there
// could be merged by the linker into code that runs on older processors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmkern {

// torch's intra-op thread count; 1 in a child of fork(), where torch's OpenMP pool would hang. To
// be asked before run_tasks, not inside a task: another thread may be told another number.
int64_t num_threads();

// Calls fn(context, task) for task in [0, tasks), each once, on torch's threads. Tasks are handed
// out in order to whichever thread is free, so put long ones first. The result must not depend on
// who ran what. Each thread reserves `scratch` bytes first: a task that others wait for asks
// thread_scratch for just as many, which cannot fail then.
void run_tasks(int64_t tasks, void (*fn)(void* context, int64_t task), void* context,
               size_t scratch);

// Returns once *turn is `value`, and with it all that was written before pass_turn set it. Only for
// turns that an earlier task of the same run_tasks passes on: tasks start in order, so that one
// never waits for what cannot come.
void await_turn(const int32_t* turn, int32_t value);
void pass_turn(int32_t* turn, int32_t next);

// Memory of this thread, 64-byte aligned, valid until its next call; at least `bytes` long,
// contents undefined.
void* thread_scratch(size_t bytes);

namespace {
template <class F>
inline void parallel_tasks(int64_t tasks, const F& f, size_t scratch = 0) {
  run_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<F*>(&f), scratch);
}
}  // namespace

}  // namespace mmkern
