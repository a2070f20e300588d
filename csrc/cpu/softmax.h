// Arguments of the softmax kernels. Strides count elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkern {

enum class SoftmaxKind { softmax, log_softmax, masked };

// An input or the output: where a row starts is found by the strides of the outer dims, where an
// element of it lies by `col`. `inner` is the stride of the last dim where that is not the one
// summed over.
struct SoftmaxOperand {
  void* data;
  const int64_t* outer;
  int64_t col, inner;
};

struct SoftmaxArgs {
  SoftmaxKind kind;
  Dtype dtype;  // of x and out
  MaskKind mask_kind, bias_kind;
  SoftmaxOperand x, mask, bias, out;
  int outer_dims;
  const int64_t* outer_sizes;
  int64_t cols;   // elements summed over
  int64_t inner;  // neighbouring rows worked on side by side; 1 where the last dim is summed over
  float scale;    // masked only: scores are scale * x + bias + mask
  bool fresh;  // out was allocated for this call: its first write brings its pages into the cache
};

MMKERN_KERNEL(softmax, SoftmaxArgs)

}  // namespace mmkern
