// What op files share when they turn torch tensors into kernel arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

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

inline MaskKind mask_kind_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Bool) return MaskKind::boolean;
  switch (dtype_of(t, name)) {
    case Dtype::f32: return MaskKind::f32;
    case Dtype::bf16: return MaskKind::bf16;
    case Dtype::f16: return MaskKind::f16;
  }
  return MaskKind::none;
}

// Whether rows_of can describe `t`. mmkern/ops/position.py asks the same for its fake outputs.
inline bool has_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return (t.size(last) <= 1 || t.stride(last) == 1) && (last < 4 || t.is_contiguous());
}

// An output like `t`, of the same strides where both have rows; else `t` becomes a contiguous copy
// first.
inline Tensor empty_rows(Tensor* t) {
  if (has_rows(*t)) {
    Tensor out = torch::stable::empty_like(*t);
    if (has_rows(out)) return out;
  }
  *t = torch::stable::contiguous(*t);
  return torch::stable::empty_like(*t);
}

// `t` (..., length, dim) as rows. Of more than two leading dims, which are contiguous, the first
// stays the batch and the others are the heads; or with `grid`, the last is the heads and the
// others the batch.
inline Rows rows_of(const Tensor& t, bool grid = false) {
  const auto size = t.sizes(), stride = t.strides();
  const int64_t rank = t.dim(), leading = rank - 2;
  Rows r;
  r.length = size[rank - 2], r.stride_l = stride[rank - 2], r.dim = size[rank - 1];
  r.batch = r.heads = 1;
  const int64_t split = grid ? leading - 1 : 1;  // dims before it are the batch
  for (int64_t d = leading - 1; d >= 0; --d) {
    if (size[d] == 1) continue;
    int64_t& count = d < split ? r.batch : r.heads;
    int64_t& step = d < split ? r.stride_b : r.stride_h;
    if (count == 1) step = stride[d];
    count *= size[d];
  }
  r.data = const_cast<void*>(t.const_data_ptr());
  return r;
}

// The dropout mask of `t` (..., heads, rows, columns), as mmkern/reference/philox.py numbers it.
inline KeepPlaces keep_places(const Tensor& t, double dropout_p,
                              const std::optional<Tensor>& seed) {
  if (!seed) return {};
  const int64_t rank = t.dim();
  return {dropout_p, *seed->const_data_ptr<int64_t>(), rank > 2 ? t.size(rank - 3) : 1};
}

}  // namespace mmkern
