// Arguments of the softmax kernels: `rows` rows of `cols` elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkern {

struct SoftmaxArgs {
  Dtype dtype;
  const void* x;
  void* out;
  int64_t rows, cols;
};

MMKERN_KERNEL(softmax_rows, SoftmaxArgs)

}  // namespace mmkern
