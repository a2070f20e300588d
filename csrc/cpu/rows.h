// A tensor seen as rows of `dim` contiguous elements: what position kernels loop over. Strides are
// in elements, so a (batch, length, heads, dim) projection transposed to (batch, heads, length,
// dim) is read and written where it lies.
#pragma once

#include <cstdint>

namespace mmkern {

struct Rows {
  void* data = nullptr;  // null where there is no such tensor
  int64_t batch = 0, heads = 0, length = 0, dim = 0;
  int64_t stride_b = 0, stride_h = 0, stride_l = 0;
};

// Which element of a dropout mask stands at a row: with `row` counting all rows of all leading
// dims, (batch, head) is (row / length) divided by `heads`, the size of the last dim before the
// rows.
struct KeepPlaces {
  double dropout_p = 0.0;
  int64_t seed = 0, heads = 1;
};

}  // namespace mmkern
