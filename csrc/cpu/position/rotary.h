// Arguments of the rotary kernel: pairs of channels of q's and k's rows turned by an angle that
// grows with the row's position.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace mmkern {

struct RotaryArgs {
  Dtype dtype;
  // k.data null: q alone. With positions_stride_b, q's and k's batch are the same.
  Rows q, q_out, k, k_out;
  const int64_t* positions;    // null: 0, 1, 2, ...
  int64_t positions_stride_b;  // 0: the same for every batch entry
  bool interleaved;            // pairs are (2i, 2i+1), not (i, i + pairs)
  bool inverse;                // turn back: the gradient of turning
  int64_t pairs;               // rotary_dim / 2
  const uint64_t* turns;       // of each pair, per position; kMaxPadding more may be read
  int64_t grid_width;  // 0, or: the first half of the pairs turns with position / grid_width,
                       // the second with the remainder, both by the first half of turns
};

constexpr int64_t kMaxPadding = 16;

MMKERN_KERNEL(rotate, RotaryArgs)

}  // namespace mmkern
