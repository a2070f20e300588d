// Arguments of the kernels that sum gradients of rows into the tables that the rows came from.
#pragma once

#include "cpu/position/forward.h"

namespace mmkern {

// out[position] = sum of the rows of grad at that position, for the `positions` rows of out.
struct PositionSums {
  Dtype dtype;
  Rows grad;
  void* out;  // (positions, dim), contiguous
  int64_t positions;
  int64_t offset;          // position of the first row ...
  const int64_t* offsets;  // ... or one per batch
  KeepPlaces keep;
};

MMKERN_KERNEL(sum_positions, PositionSums)

// out[id] = scale * sum of the rows of grad whose token is id: rows order[starts[id]] up to
// order[starts[id + 1]], which rise.
struct TokenSums {
  Dtype dtype;
  Rows grad;
  void* out;  // (vocabulary, dim), contiguous
  int64_t vocabulary;
  const int64_t *starts, *order;
  float scale;
  KeepPlaces keep;
};

MMKERN_KERNEL(sum_tokens, TokenSums)

}  // namespace mmkern
