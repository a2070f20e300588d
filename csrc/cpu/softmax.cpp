// Softmax on CPU: tensors in, kernel arguments out. The kernels are in softmax.isa.cpp.
#include "cpu/softmax.h"

#include <optional>

#include "cpu/tensor.h"

namespace mmkern {
namespace {

using MaybeTensor = std::optional<Tensor>;

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
         const MaybeTensor& bias, const Tensor& out, bool fresh = true) {
  if (x.numel() == 0) return;
  const int64_t last = x.dim() - 1;
  const Tensor* tensors[4] = {&x, mask ? &*mask : nullptr, bias ? &*bias : nullptr, &out};
  const auto stride = [&](int i, int64_t d) { return tensors[i] ? tensors[i]->stride(d) : 0; };
  Loop loop;
  for (int64_t d = 0; d <= last; ++d) {
    if (d == dim || (d == last && dim != last)) continue;
    loop.add(x.size(d), {stride(0, d), stride(1, d), stride(2, d), stride(3, d)});
  }
  const auto operand = [&](int i, const void* data) {
    return SoftmaxOperand{const_cast<void*>(data), loop.strides[i].data(), stride(i, dim),
                          dim == last ? 0 : stride(i, last)};
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
  a.inner = dim == last ? 1 : x.size(last);
  a.scale = float(scale);
  a.fresh = fresh;
  softmax(a);
}

Tensor new_output(const Tensor& x) { return torch::stable::empty(x.sizes(), x.scalar_type()); }

Tensor softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  run(SoftmaxKind::softmax, x, dim, {}, 1.0, {}, out);
  return out;
}
Tensor log_softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  run(SoftmaxKind::log_softmax, x, dim, {}, 1.0, {}, out);
  return out;
}
void softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  run(SoftmaxKind::softmax, x, dim, {}, 1.0, {}, out, false);
}
void log_softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  run(SoftmaxKind::log_softmax, x, dim, {}, 1.0, {}, out, false);
}
Tensor masked_softmax_fwd(const Tensor& x, const MaybeTensor& mask, double scale,
                          const MaybeTensor& bias, int64_t dim, double dropout_p,
                          const MaybeTensor& seed) {
  STD_TORCH_CHECK(dropout_p == 0.0 && !seed, "dropout_p: dropout has no CPU kernel");
  Tensor out = new_output(x);
  run(SoftmaxKind::masked, x, dim, mask, scale, bias, out);
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
