// Softmax on CUDA: tensors in, kernel arguments out. The kernels are in softmax.cu.
#include "cuda/softmax.h"

#include "cuda/tensor.h"

namespace mmkern {
namespace {

void forward(const char* op, Tensor x, int64_t dim, Tensor out, bool log) {
  if (x.numel() == 0) return;
  SoftmaxArgs a{};
  a.log = log;
  const Dtype dtype = dtype_of(x, "input");
  a.shape = rows_of({&x, &out}, dim, {&a.x, &a.out});
  const int64_t width = a.shape.width;
  a.aligned =
      aligned_rows(a.x, width, size_of(dtype)) && aligned_rows(a.out, width, size_of(dtype));
  const RowPlan plan = plan_rows(a.shape.rows, width);
  const Stream stream(x);
  check_launch(launch_softmax(a, dtype, plan, stream.get()), op, plan);
}

Tensor backward(const char* op, Tensor grad, Tensor output, int64_t dim, bool log) {
  Tensor out =
      torch::stable::empty(output.sizes(), output.scalar_type(), std::nullopt, output.device());
  if (output.numel() == 0) return out;
  SoftmaxArgs a{};
  a.log = log;
  const Dtype dtype = dtype_of(output, "output");
  Tensor found = out;
  a.shape = rows_of({&grad, &output, &found}, dim, {&a.x, &a.y, &a.out});
  a.aligned = true;
  for (const RowOperand* o : {&a.x, &a.y, &a.out})
    a.aligned = a.aligned && aligned_rows(*o, a.shape.width, size_of(dtype));
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.width);
  const Stream stream(output);
  check_launch(launch_softmax_bwd(a, dtype, plan, stream.get()), op, plan);
  return out;
}

Tensor new_output(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
}
Tensor softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  forward("softmax_fwd", x, dim, out, false);
  return out;
}
Tensor log_softmax_fwd(const Tensor& x, int64_t dim) {
  Tensor out = new_output(x);
  forward("log_softmax_fwd", x, dim, out, true);
  return out;
}
// Whether writing `out` could change an element of x that is still to be read: they share memory,
// and not place by place. Where they do, each thread reads its elements before it writes them.
bool overlap(const Tensor& x, const Tensor& out) {
  const auto sizes = x.sizes(), steps = x.strides(), out_steps = out.strides();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  const char* const to = static_cast<const char*>(out.const_data_ptr());
  bool same = from == to;
  int64_t last = 1,
          out_last = 1;  // elements from the first to the farthest; strides are never negative
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return false;
    if (sizes[d] > 1) same = same && steps[d] == out_steps[d];
    last += (sizes[d] - 1) * steps[d];
    out_last += (sizes[d] - 1) * out_steps[d];
  }
  const int64_t size = int64_t(x.element_size());
  return !same && from < to + out_last * size && to < from + last * size;
}
// Into `out`, whatever its strides: where no four tell its rows, through a contiguous one.
void into(const char* op, const Tensor& x, int64_t dim, const Tensor& out, bool log) {
  if (out.is_contiguous())
    return forward(op, overlap(x, out) ? torch::stable::clone(x) : x, dim, out, log);
  Tensor fresh = new_output(x), target = out;
  forward(op, x, dim, fresh, log);
  torch::stable::copy_(target, fresh);
}
void softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  into("softmax_out", x, dim, out, false);
}
void log_softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  into("log_softmax_out", x, dim, out, true);
}

Tensor softmax_bwd(const Tensor& grad, const Tensor& output, int64_t dim) {
  return backward("softmax_bwd", grad, output, dim, false);
}
Tensor log_softmax_bwd(const Tensor& grad, const Tensor& output, int64_t dim) {
  return backward("log_softmax_bwd", grad, output, dim, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern_cuda, MMKERN_DEVICE_KEY, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("log_softmax_fwd", TORCH_BOX(&log_softmax_fwd));
  m.impl("softmax_out", TORCH_BOX(&softmax_out));
  m.impl("log_softmax_out", TORCH_BOX(&log_softmax_out));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
  m.impl("log_softmax_bwd", TORCH_BOX(&log_softmax_bwd));
}

}  // namespace mmkern
