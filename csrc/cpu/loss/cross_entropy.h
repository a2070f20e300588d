// Arguments of the cross-entropy kernels. Strides count elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkern {

// A tensor (batch, classes, inner): where element (n, c, i) lies. Absent where data is null.
struct ClassOperand {
  void* data;
  int64_t n, c, i;
};

// All operands have unit stride along the classes, or else along inner.
struct CrossEntropyArgs {
  Dtype dtype;       // of x and grad
  Dtype soft_dtype;  // of soft and grad_soft: that of x, or float32
  bool columns;      // inner has unit stride: positions are worked on side by side, one a lane
  int64_t batch, classes, inner;
  ClassOperand x, grad, soft, grad_soft;
  const int64_t* target;  // (batch, inner) classes within bounds or ignore_index; null with soft
  int64_t ignore_index;
  const float* weight;  // (classes), or null: all 1
  float weight_sum;
  float label_smoothing;
  float factor;  // of the gradients
  float* loss;   // (batch, inner)
};

namespace {
// Asked wherever a target picks an element: another thread may change one after it was checked.
// Such a row counts as ignored.
inline bool has_class(const CrossEntropyArgs& a, int64_t target) {
  return uint64_t(target) < uint64_t(a.classes);
}
}  // namespace

// out = x * factor, with a factor for each of (batch, inner), or one for all. out may be x.
struct ScaleRowsArgs {
  Dtype dtype;
  bool columns;
  int64_t batch, classes, inner;
  ClassOperand x, out;
  const float* factor;
  int64_t factor_step;  // 0: one for all
};

MMKERN_KERNEL(cross_entropy, CrossEntropyArgs)
MMKERN_KERNEL(scale_rows, ScaleRowsArgs)

}  // namespace mmkern
