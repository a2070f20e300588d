#include "cpu/position/turns.h"

#include <cmath>

namespace mmkern {
namespace {

// exp costs 5 ns: one for each of the first kFine frequencies and one per kFine after them, and a
// product for every other, so 384 frequencies take 0.3 us instead of 2.
constexpr int64_t kFine = 16;
constexpr double kTurnsPerRadian = 0.159154943091895335769;

// 0 where there are too many to have a fraction, or infinitely many.
uint64_t fixed_point(double turns) {
  const double fraction = turns - std::floor(turns);
  return fraction < 1.0 ? uint64_t(fraction * 0x1p64) : 0;
}

}  // namespace

void fill_turns(uint64_t* turns, int64_t n, double base, double step, int64_t first) {
  const double rate = -step * std::log(base);
  double fine[kFine];
  for (int64_t i = 0; i < kFine && i < n; ++i) fine[i] = std::exp(rate * double(i));
  for (int64_t i = 0; i < n; i += kFine) {
    const double coarse = std::exp(rate * double(first + i)) * kTurnsPerRadian;
    for (int64_t j = 0; j < kFine && i + j < n; ++j) turns[i + j] = fixed_point(coarse * fine[j]);
  }
}

}  // namespace mmkern
