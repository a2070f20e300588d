// Softmax on CPU: tensors in, kernel arguments out. The kernels are in softmax.isa.cpp.
#include "cpu/softmax.h"

#include <optional>

#include "cpu/tensor.h"

namespace mmkern {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Fewer neighbouring rows are walked one by one: side by side they would fill half a vector at
// most.
constexpr int64_t kFewestColumns = 8;

// Outer dims in order, neighbours joined where every operand steps through both as through one.
struct Loop {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[4];

  void add(int64_t size, const int64_t (&stride)[4]) {
    if (size == 1) return;
    bool joins = !sizes.empty();
    for (int i = 0; joins && i < 4; ++i) joins = strides[i].back() == stride[i] * size;
    if (joins) {
      sizes.back() *= size;
    } else {
      sizes.push_back(size);
    }
    for (int i = 0; i < 4; ++i) {
      if (joins) {
        strides[i].back() = stride[i];
      } else {
        strides[i].push_back(stride[i]);
      }
    }
  }
};

void run(SoftmaxKind kind, const Tensor& x, int64_t dim, const MaybeTensor& mask, double scale,
         const MaybeTensor& bias, const Tensor& out, bool fresh) {
  if (x.numel() == 0) return;
  const Tensor* tensors[4] = {&x, mask ? &*mask : nullptr, bias ? &*bias : nullptr, &out};
  // 0 along the dims that a mask or bias has not, or has once for all.
  const auto stride = [&](int i, int64_t d) -> int64_t {
    if (!tensors[i]) return 0;
    const int64_t own = d - (x.dim() - tensors[i]->dim());
    return own < 0 || (i % 3 && tensors[i]->size(own) == 1) ? 0 : tensors[i]->stride(own);
  };
  // The dims after `dim` as one, as far as every operand steps through them as through one; the
  // first of them that does not join stays an outer dim, as do all before it.
  int64_t inner = 1, inner_stride[4] = {1, 0, 0, 1}, split = x.dim();
  for (int64_t d = x.dim() - 1; d > dim; --d, --split) {
    if (x.size(d) == 1) continue;
    bool joins = true;
    for (int i = 0; i < 4 && inner > 1; ++i) joins &= stride(i, d) == inner_stride[i] * inner;
    if (!joins) break;
    for (int i = 0; i < 4 && inner == 1; ++i) inner_stride[i] = stride(i, d);
    inner *= x.size(d);
  }
  if (inner < kFewestColumns || inner_stride[0] != 1 || inner_stride[3] != 1) {
    inner = 1, split = x.dim();
  }
  Loop loop;
  for (int64_t d = 0; d < split; ++d) {
    if (d != dim) loop.add(x.size(d), {stride(0, d), stride(1, d), stride(2, d), stride(3, d)});
  }
  const auto operand = [&](int i, const void* data) {
    return SoftmaxOperand{const_cast<void*>(data), loop.strides[i].data(), stride(i, dim),
                          inner == 1 ? 0 : inner_stride[i]};
  };
  SoftmaxArgs a{};
  a.kind = kind;
  a.dtype = dtype_of(x, "input");
  a.x = operand(0, x.const_data_ptr());
  if (mask) {
    a.mask_kind = mask_kind_of(*mask, "mask");
    a.mask = operand(1, mask->const_data_ptr());
  }
  if (bias) {
    a.bias_kind = mask_kind_of(*bias, "bias");
    a.bias = operand(2, bias->const_data_ptr());
  }
  a.out = operand(3, out.mutable_data_ptr());
  a.outer_dims = int(loop.sizes.size());
  a.outer_sizes = loop.sizes.data();
  a.cols = x.size(dim);
  a.inner = inner;
  a.scale = float(scale);
  a.fresh = fresh;
  softmax(a);
}

// Whether writing `out` could change an element of x that is still to be read: they share memory,
// and not place by place.
bool overlap(const Tensor& x, const Tensor& out) {
  const auto sizes = x.sizes(), steps = x.strides(), out_steps = out.strides();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  const char* const to = static_cast<const char*>(out.const_data_ptr());
  bool same = from == to;
  int64_t last = 0, out_last = 0;  // the farthest elements; strides are never negative
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return false;
    if (sizes[d] > 1) same &= steps[d] == out_steps[d];
    last += (sizes[d] - 1) * steps[d];
    out_last += (sizes[d] - 1) * out_steps[d];
  }
  const int64_t size = x.element_size();
  return !same && from < to + (out_last + 1) * size && to < from + (last + 1) * size;
}

Tensor new_output(const Tensor& x) { return torch::stable::empty(x.sizes(), x.scalar_type()); }

Tensor softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  run(SoftmaxKind::softmax, x, dim, {}, 1.0, {}, out, true);
  return out;
}
Tensor log_softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  run(SoftmaxKind::log_softmax, x, dim, {}, 1.0, {}, out, true);
  return out;
}
void softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  run(SoftmaxKind::softmax, overlap(x, out) ? torch::stable::clone(x) : x, dim, {}, 1.0, {}, out,
      false);
}
void log_softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  run(SoftmaxKind::log_softmax, overlap(x, out) ? torch::stable::clone(x) : x, dim, {}, 1.0, {},
      out, false);
}
Tensor masked_softmax_fwd(const Tensor& x, const MaybeTensor& mask, double scale,
                          const MaybeTensor& bias, int64_t dim, double dropout_p,
                          const MaybeTensor& seed) {
  STD_TORCH_CHECK(dropout_p == 0.0 && !seed, "dropout_p: dropout has no CPU kernel");
  Tensor out = new_output(x);
  run(SoftmaxKind::masked, x, dim, mask, scale, bias, out, true);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_out", TORCH_BOX(&softmax_out));
  m.impl("log_softmax_fwd", TORCH_BOX(&log_softmax_fwd));
  m.impl("log_softmax_out", TORCH_BOX(&log_softmax_out));
  m.impl("masked_softmax_fwd", TORCH_BOX(&masked_softmax_fwd));
}

}  // namespace mmkern
