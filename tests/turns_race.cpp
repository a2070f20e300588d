// The kernels' own synchronisation under ThreadSanitizer, which cannot see into torch's pool: tasks
// handed out in order to four threads (csrc/cpu/parallel.cpp run_tasks) add to one sum, each in its
// turn, as attention backward adds the parts of grad_q (attention/backward.isa.cpp add_rows).
//
// With the argument "race" a turn is looked at without its memory order: ThreadSanitizer must see
// that, or it would see nothing at all. With "poor" one thread finds no memory: the others do all.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "cpu/task_loop.h"

namespace {

constexpr int64_t kUnits = 64, kBlocks = 24, kWidth = 33;

struct Sums {
  float total[kUnits][kWidth] = {};
  int32_t turns[kUnits] = {};
  bool race = false;

  // Block `block` of a unit, after the block before it.
  void add(int64_t unit, int64_t block) {
    int32_t* const turn = &turns[unit];
    if (race) {
      while (__atomic_load_n(turn, __ATOMIC_RELAXED) != block) std::this_thread::yield();
    } else if (block > 0) {
      mmkern::await(turn, int32_t(block));
    }
    for (int64_t d = 0; d < kWidth; ++d) total[unit][d] += float(unit + block * d);
    mmkern::pass(turn, int32_t(block + 1));
  }
};

}  // namespace

int main(int count, char** arguments) {
  for (int repeat = 0; repeat < 20; ++repeat) {
    Sums sums;
    sums.race = count > 1 && !std::strcmp(arguments[1], "race");
    const bool poor = count > 1 && !std::strcmp(arguments[1], "poor");
    mmkern::TaskLoop loop(kUnits * kBlocks);
    // Blocks of a unit are far apart, as key blocks are: several threads are in each unit.
    std::atomic<int> here{0};
    std::atomic<int> failed{0};
    const auto work = [&] {
      const int place = here++;
      while (here < 4) std::this_thread::yield();  // else the first has done all
      const auto reserve = [&] {
        if (poor && place == 1) throw std::bad_alloc();
      };
      try {
        loop.run(reserve, [&](int64_t task) {
          sums.add(task % kUnits, task / kUnits);
          if (task % 16 == 0) std::this_thread::yield();  // on few cores, too, threads alternate
        });
      } catch (const std::bad_alloc&) {
        ++failed;
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
    if (failed != (poor ? 1 : 0)) return std::puts("no thread failed, or too many"), 1;
    for (int64_t unit = 0; unit < kUnits; ++unit) {
      for (int64_t d = 0; d < kWidth; ++d) {
        float want = 0.0f;
        for (int64_t block = 0; block < kBlocks; ++block) want += float(unit + block * d);
        if (sums.total[unit][d] != want) return std::puts("a sum is wrong"), 1;
      }
    }
  }
  return std::puts("every sum is right"), 0;
}
