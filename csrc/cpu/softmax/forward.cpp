// Softmax on CPU: tensors in, kernel arguments out. The kernels are in forward.isa.cpp.
#include "cpu/check.h"
#include "cpu/pages.h"
#include "cpu/softmax/loops.h"

namespace mmkern {
namespace {

void run(SoftmaxKind kind, const Tensor& x, int64_t dim, const MaybeTensor& mask, double scale,
         const MaybeTensor& bias, double dropout_p, const MaybeTensor& seed, const Tensor& out,
         bool fresh) {
  if (x.numel() == 0) return;
  SoftmaxLoops loops(dim, true, Layout(x), Layout(mask), Layout(bias), Layout(out));
  SoftmaxArgs& a = loops.args;
  a.kind = kind;
  a.dtype = dtype_of(x, "input");
  a.x.data = const_cast<void*>(x.const_data_ptr());
  a.out.data = out.mutable_data_ptr();
  loops.set_terms(mask, bias);
  loops.set_dropout(dropout_p, seed);
  a.scale = float(scale);
  a.fresh = fresh;
  softmax(a);
}
void run(SoftmaxKind kind, const Tensor& x, int64_t dim, const Tensor& out, bool fresh) {
  run(kind, x, dim, {}, 1.0, {}, 0.0, {}, out, fresh);
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

Tensor new_output(const Tensor& x) {
  Tensor out = torch::stable::empty(x.sizes(), x.scalar_type());
  use_large_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}

void check_input(const Tensor& x, int64_t dim) { check_dim(dim, Checked(x, "input").floating()); }
void check_out(const Tensor& x, int64_t dim, const Tensor& out) {
  check_input(x, dim);
  Checked(out, "out").like(Checked(x, "input")).writable();
}

Tensor softmax_fwd(const Tensor& x, int64_t dim) {
  check_input(x, dim);
  Tensor out = new_output(x);
  run(SoftmaxKind::softmax, x, dim, out, true);
  return out;
}
Tensor log_softmax_fwd(const Tensor& x, int64_t dim) {
  check_input(x, dim);
  Tensor out = new_output(x);
  run(SoftmaxKind::log_softmax, x, dim, out, true);
  return out;
}
void softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  check_out(x, dim, out);
  run(SoftmaxKind::softmax, overlap(x, out) ? torch::stable::clone(x) : x, dim, out, false);
}
void log_softmax_out(const Tensor& x, int64_t dim, const Tensor& out) {
  check_out(x, dim, out);
  run(SoftmaxKind::log_softmax, overlap(x, out) ? torch::stable::clone(x) : x, dim, out, false);
}
Tensor masked_softmax_fwd(const Tensor& x, const MaybeTensor& mask, double scale,
                          const MaybeTensor& bias, int64_t dim, double dropout_p,
                          const MaybeTensor& seed) {
  check_input(x, dim);
  check_terms(Checked(x, "input"), mask, bias, scale, dropout_p, seed);
  Tensor out = new_output(x);
  run(SoftmaxKind::masked, x, dim, mask, scale, bias, dropout_p, seed, out, true);
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
