// Arguments of the softmax kernels and their launchers; see softmax.cu.
#pragma once

#include "cuda/plan.h"

namespace mmkern {

struct SoftmaxArgs {
  RowShape shape;
  RowOperand x, y, out;  // forward: input, -, result; backward: gradient, output, result
  bool log, aligned;     // aligned: rows are contiguous and start at multiples of 16 bytes
};

// Null, or what CUDA says of the launch.
const char* launch_softmax(const SoftmaxArgs& args, Dtype dtype, const RowPlan& plan, void* stream);
const char* launch_softmax_bwd(const SoftmaxArgs& args, Dtype dtype, const RowPlan& plan,
                               void* stream);

}  // namespace mmkern
