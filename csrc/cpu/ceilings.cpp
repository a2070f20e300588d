// Timing of the loops in ceilings.isa.cpp.
#include "cpu/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/parallel.h"

namespace mmkern {
namespace {

constexpr int64_t kLoopRounds = 100000;            // of 12 multiply-adds: 0.2 to 0.4 ms a task
constexpr int64_t kTasksPerThread = 8;             // a late thread takes fewer
constexpr int64_t kRoundBytes = int64_t{8} << 20;  // moved per timed round at least, by each thread

using Clock = std::chrono::steady_clock;

// The largest work() per second over rounds that together take `seconds`.
template <class Work>
double best_rate(double seconds, const Work& work) {
  double best = 0;
  const auto begin = Clock::now();
  for (auto from = begin; from - begin < std::chrono::duration<double>(seconds);) {
    const double done = work();
    const auto to = Clock::now();
    best = std::max(best, done / std::chrono::duration<double>(to - from).count());
    from = to;
  }
  return best;
}

double arithmetic_gflops(void (*loop)(const ArithmeticArgs&), double seconds) {
  return 1e-9 * best_rate(seconds, [&] {
           const int64_t tasks = num_threads() * kTasksPerThread;
           double operations = 0;  // the same from every task
           parallel_tasks(tasks, [&](int64_t task) {
             float sink = 0.5f;
             double own;
             loop({kLoopRounds, &own, &sink});
             if (task == 0) operations = own;
           });
           return operations * double(tasks);
         });
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Room for `count` floats, each page first written by one of torch's threads.
std::unique_ptr<float, Free> floats(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(float) + 4095) & ~size_t{4095};
  std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(4096, bytes)));
  if (!memory) throw std::bad_alloc();
  const int64_t pages = int64_t(bytes / 4096), tasks = num_threads();
  parallel_tasks(tasks, [&](int64_t task) {
    const int64_t first = pages * task / tasks, last = pages * (task + 1) / tasks;
    std::memset(memory.get() + first * 1024, 0, size_t(last - first) * 4096);
  });
  return memory;
}

// GB/s at which move(first, count) gets through `count` floats split over the threads; small
// amounts are repeated inside each task, so that starting the threads is not what is timed.
template <class Move>
double stream_gbs(int64_t count, double bytes_per_float, double seconds, const Move& move) {
  const int64_t threads = num_threads(), share = count / threads;
  const int64_t repeats = std::max<int64_t>(1, kRoundBytes / (4 * std::max<int64_t>(share, 1)));
  return 1e-9 * best_rate(seconds, [&] {
           parallel_tasks(threads, [&](int64_t task) {
             for (int64_t i = 0; i < repeats; ++i) move(task * share, share);
           });
           return bytes_per_float * double(share * threads * repeats);
         });
}

}  // namespace

double fma_gflops(double seconds) { return arithmetic_gflops(&fma_loop, seconds); }

double bf16_dot_gflops(double seconds) {
  if (current_isa != Isa::avx512_bf16) return 0;
  return arithmetic_gflops(&bf16_dot_loop, seconds);
}

double copy_gbs(int64_t bytes, double seconds) {
  const int64_t count = bytes / 4;
  const auto from = floats(count), to = floats(count);
  const double stored = stream_gbs(count, 8, seconds / 2, [&](int64_t first, int64_t n) {
    copy_loop({from.get() + first, to.get() + first, n, nullptr});
  });
  // memcpy writes past the caches where the size is worth it, and so may a kernel.
  const double streamed = stream_gbs(count, 8, seconds / 2, [&](int64_t first, int64_t n) {
    std::memcpy(to.get() + first, from.get() + first, size_t(n) * 4);
  });
  return std::max(stored, streamed);
}

double read_gbs(int64_t bytes, double seconds) {
  const int64_t count = bytes / 4;
  const auto from = floats(count);
  return stream_gbs(count, 4, seconds, [&](int64_t first, int64_t n) {
    float sink;
    read_loop({from.get() + first, nullptr, n, &sink});
  });
}

}  // namespace mmkern
