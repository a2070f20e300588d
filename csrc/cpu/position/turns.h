// Angles as 64-bit fixed-point turns: 2^64 is one whole turn, so that the product of a frequency
// and a position wraps exactly where the angle does, for any position, with no reduction by pi.
#pragma once

#include <cstdint>

namespace mmkern {

// turns[i] = base^(-(first + i) * step) radians, for i in [0, n). The error is that of a double
// frequency: at position 2^20, 1e-9 radians.
void fill_turns(uint64_t* turns, int64_t n, double base, double step, int64_t first = 0);

}  // namespace mmkern
