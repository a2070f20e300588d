// What op files share when they turn torch tensors into kernel arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dtype.h"
#include "cpu/rows.h"

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

// `t` (..., length, dim) as rows. Of more than two leading dims, the first stays the batch and the
// others are the heads; or with `grid`, the last is the heads and the others are the batch. Empty
// data where strides do not allow it: the last dim is not contiguous, or dims to be merged do not
// lie together.
inline Rows rows_of(const Tensor& t, bool grid = false) {
  const auto size = t.sizes(), stride = t.strides();
  const int64_t rank = t.dim(), leading = rank - 2;
  if (size[rank - 1] > 1 && stride[rank - 1] != 1) return {};
  Rows r;
  r.length = size[rank - 2], r.stride_l = stride[rank - 2], r.dim = size[rank - 1];
  r.batch = r.heads = 1;
  const int64_t split = grid ? leading - 1 : 1;  // dims before it are the batch
  for (int64_t d = leading - 1; d >= 0; --d) {
    if (size[d] == 1) continue;
    int64_t& count = d < split ? r.batch : r.heads;
    int64_t& step = d < split ? r.stride_b : r.stride_h;
    if (count == 1) {
      step = stride[d];
    } else if (stride[d] != step * count) {
      return {};
    }
    count *= size[d];
  }
  r.data = const_cast<void*>(t.const_data_ptr());
  return r;
}

}  // namespace mmkern
