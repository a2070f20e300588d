// Softmax backward on CPU: tensors in, kernel arguments out. The kernels are in
// backward.isa.cpp.
#include <algorithm>
#include <tuple>

#include "cpu/pages.h"
#include "cpu/softmax/loops.h"

namespace mmkern {
namespace {

// Which gradients are wanted: bits of `wanted`, in the order of the results.
enum Wanted { kInput = 1, kMask = 2, kBias = 4 };

// Rows with one place in a term's gradient that are added one after the other. 64 keep the sums
// exact and take 1/64 of x's memory for them; a term with few elements gives threads more to share
// by shorter parts, of 8 rows at least.
constexpr int64_t kMostPartRows = 64, kFewestPartRows = 8, kPartElements = 32768;
constexpr int64_t kManyElements = 262144;
int64_t part_rows(int64_t elements) {
  if (elements >= kManyElements) return kMostPartRows;
  return std::clamp(kPartElements / elements, kFewestPartRows, kMostPartRows);
}

Tensor new_gradient(const Tensor& t) {
  Tensor out = torch::stable::empty(t.sizes(), t.scalar_type());
  use_large_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}
Tensor none(ScalarType type) { return torch::stable::empty({0}, type); }

// What the three ops share. x: the output, or what it is computed from again.
struct Backward {
  SoftmaxKind kind;
  const Tensor &grad, &x;
  int64_t dim;
  MaybeTensor mask{}, bias{};
  double scale = 1.0, dropout_p = 0.0;
  MaybeTensor seed{};

  // Writes the gradients of the input and of one term, where they are given.
  void run(Tensor* out, Tensor* term) const {
    if (x.numel() == 0) {
      if (term && term->numel()) torch::stable::zero_(*term);
      return;
    }
    std::vector<int64_t> dense(x.dim(),
                               1);  // the strides of the output, whether it is wanted or not
    for (int64_t d = x.dim() - 2; d >= 0; --d) dense[d] = dense[d + 1] * x.size(d + 1);
    // Sums for a term, and random words, go along a row.
    const bool side_by_side = !term && !seed;
    // A row of columns is read as whole vectors, or else gathered: cheaper once than row by row.
    const bool copies = side_by_side && dim < x.dim() - 1 && x.is_contiguous();
    const Tensor g = copies ? torch::stable::contiguous(grad) : grad;
    SoftmaxLoops loops(dim, side_by_side, Layout(x), Layout(mask), Layout(bias),
                       Layout(x.sizes().data(), dense.data(), x.dim()), Layout(g),
                       term ? Layout(*term) : Layout());
    SoftmaxArgs& a = loops.args;
    a.kind = kind;
    a.dtype = dtype_of(x, "output");
    a.x.data = const_cast<void*>(x.const_data_ptr());
    a.grad.data = const_cast<void*>(g.const_data_ptr());
    if (out) a.out.data = out->mutable_data_ptr();
    loops.set_terms(mask, bias);
    loops.set_dropout(dropout_p, seed);
    a.from_input = bool(seed);
    a.scale = float(scale);
    a.part_rows = 1;
    Tensor parts;
    if (term) {
      a.term.data = term->mutable_data_ptr();
      a.term_kind = mask_kind_of(*term, "wanted");
      const int64_t elements = x.numel() / a.shared;  // that are added to side by side
      a.part_rows = part_rows(elements);
      const int64_t count = (a.shared + a.part_rows - 1) / a.part_rows;
      if (count > 1) {
        parts = torch::stable::empty({count * (a.term.col ? elements : elements / a.cols)},
                                     ScalarType::Float);
        a.parts = parts.mutable_data_ptr<float>();
      }
    }
    softmax_backward(a);
  }
};

Tensor plain(SoftmaxKind kind, const Tensor& grad, const Tensor& output, int64_t dim) {
  const Checked y(output, "output");
  check_dim(dim, y.floating());
  Checked(grad, "grad").like(y);
  Tensor out = new_gradient(output);
  Backward{kind, grad, output, dim}.run(&out, nullptr);
  return out;
}
Tensor softmax_bwd(const Tensor& grad, const Tensor& output, int64_t dim) {
  return plain(SoftmaxKind::softmax, grad, output, dim);
}
Tensor log_softmax_bwd(const Tensor& grad, const Tensor& output, int64_t dim) {
  return plain(SoftmaxKind::log_softmax, grad, output, dim);
}

std::tuple<Tensor, Tensor, Tensor> masked_softmax_bwd(const Tensor& grad, const MaybeTensor& output,
                                                      const MaybeTensor& input,
                                                      const MaybeTensor& mask, double scale,
                                                      const MaybeTensor& bias, int64_t dim,
                                                      double dropout_p, const MaybeTensor& seed,
                                                      int64_t wanted) {
  const char *const name = seed ? "input" : "output", *const other = seed ? "output" : "input";
  if (!(seed ? input : output)) refuse(name, "needed ", seed ? "with" : "without", " dropout_seed");
  if (seed ? output : input)
    refuse(other, "not taken ", seed ? "with" : "without", " dropout_seed");
  const Tensor& x = seed ? *input : *output;
  const Checked given(x, name);
  check_dim(dim, given.floating());
  Checked(grad, "grad").like(given);
  check_terms(given, mask, bias, scale, dropout_p, seed);
  const bool has_slope = mask && mask->scalar_type() != ScalarType::Bool;
  check_wanted(wanted, kInput | (has_slope ? kMask : 0) | (bias ? kBias : 0));
  const Backward backward{SoftmaxKind::masked, grad, x, dim, mask, bias, scale, dropout_p, seed};
  const auto gradient = [&](Wanted which, const MaybeTensor& t) {
    return wanted & which ? new_gradient(*t) : none(x.scalar_type());
  };
  Tensor grad_x = wanted & kInput ? new_gradient(x) : none(x.scalar_type());
  Tensor grad_mask = gradient(kMask, mask), grad_bias = gradient(kBias, bias);
  // One pass sums for one term; both terms wanted, which is rare, take a second one.
  Tensor* const out = wanted & kInput ? &grad_x : nullptr;
  if (wanted & kBias) {
    backward.run(out, &grad_bias);
    if (wanted & kMask) backward.run(nullptr, &grad_mask);
  } else {
    backward.run(out, wanted & kMask ? &grad_mask : nullptr);
  }
  return std::make_tuple(grad_x, grad_mask, grad_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
  m.impl("log_softmax_bwd", TORCH_BOX(&log_softmax_bwd));
  m.impl("masked_softmax_bwd", TORCH_BOX(&masked_softmax_bwd));
}

}  // namespace mmkern
