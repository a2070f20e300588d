// What op files share when they turn torch tensors into kernel arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dtype.h"

namespace mmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": the CPU kernels take float32, bfloat16 and float16");
      return Dtype::f32;
  }
}

inline MaskKind mask_kind_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Bool) return MaskKind::boolean;
  switch (dtype_of(t, name)) {
    case Dtype::f32: return MaskKind::f32;
    case Dtype::bf16: return MaskKind::bf16;
    case Dtype::f16: return MaskKind::f16;
  }
  return MaskKind::none;
}

}  // namespace mmkern
