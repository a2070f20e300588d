// Softmax on CPU: tensors in, kernel arguments out. The kernels are in softmax.isa.cpp.
#include "cpu/softmax.h"

#include "cpu/tensor.h"

namespace mmkern {
namespace {

Tensor softmax_fwd(const Tensor& input, int64_t dim) {
  STD_TORCH_CHECK(dim == input.dim() - 1);
  Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  const int64_t cols = x.size(dim);
  if (x.numel() == 0) return out;
  softmax_rows(
      {dtype_of(x, "input"), x.const_data_ptr(), out.mutable_data_ptr(), x.numel() / cols, cols});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) { m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd)); }

}  // namespace mmkern
