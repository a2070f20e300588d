// Cross-entropy on CPU: tensors in, kernel arguments out. The kernels are in cross_entropy.isa.cpp.
#include "cpu/loss/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/check.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace mmkern {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 16384;  // rows whose losses or weights are added up by one task
constexpr double kHalfUnit = 16384.0;

enum Reduction : int64_t { kNone, kMean, kSum };
enum Wanted : int64_t { kInput = 1, kTarget = 2 };

// A tensor (batch, classes, ...) or (classes) as (batch, classes, inner), where it can be.
struct View {
  int64_t batch = 1, classes = 1, inner = 1;
  ClassOperand operand{};
  bool joins = true;  // the dims after the classes are stepped through as one

  explicit View(const Tensor& t) {
    operand.data = const_cast<void*>(t.const_data_ptr());
    const int64_t dim = t.dim() == 1 ? 0 : 1;
    classes = t.size(dim), operand.c = t.stride(dim);
    if (dim) batch = t.size(0), operand.n = t.stride(0);
    for (int64_t d = t.dim() - 1; d > dim; --d) {
      if (t.size(d) == 1) continue;
      if (inner == 1) operand.i = t.stride(d);
      joins &= inner == 1 || t.stride(d) == operand.i * inner;
      inner *= t.size(d);
    }
  }
  // The batch, which has unit stride, as positions.
  void turn() {
    std::swap(batch, inner);
    std::swap(operand.n, operand.i);
  }
};

enum class Layout { rows, columns, turned };

// mmkern/ops/loss.py asks the same for its fake outputs. Makes `x` contiguous where no kernel can
// walk it.
Layout layout_of(Tensor& x) {
  if (!View(x).joins) x = torch::stable::contiguous(x);
  const View v(x);
  if (v.operand.c == 1 || v.classes <= 1 || x.dim() == 1) {
    if (v.operand.c != 1) x = torch::stable::contiguous(x);
    return Layout::rows;
  }
  if (v.inner == 1 && v.operand.n == 1) return Layout::turned;
  if (v.inner == 1 || v.operand.i != 1) x = torch::stable::contiguous(x);
  return View(x).inner == 1 ? Layout::rows : Layout::columns;
}

// A new tensor of x's sizes that is laid out for the same kernel.
Tensor new_gradient(const Tensor& x, Layout layout) {
  const View v(x);
  if (layout == Layout::columns || x.dim() == 1) {
    return torch::stable::empty(x.sizes(), x.scalar_type());
  }
  if (layout == Layout::turned) {
    const Tensor t = torch::stable::empty({v.classes, v.batch}, x.scalar_type());
    return torch::stable::view(torch::stable::transpose(t, 0, 1), x.sizes());
  }
  const Tensor t = torch::stable::empty({v.batch, v.inner, v.classes}, x.scalar_type());
  return torch::stable::view(torch::stable::transpose(t, 1, 2), x.sizes());
}

template <class F>
void each_block(int64_t rows, const F& f) {
  parallel_tasks((rows + kBlock - 1) / kBlock, [&](int64_t block) {
    f(block, block * kBlock, std::min(rows, (block + 1) * kBlock));
  });
}

// Sum of value(row) in an order that depends on nothing but the number of rows.
template <class F>
double sum_rows(int64_t rows, const F& value) {
  std::vector<double> parts((rows + kBlock - 1) / kBlock);
  each_block(rows, [&](int64_t block, int64_t row, int64_t end) {
    double lanes[4] = {};
    for (; row + 4 <= end; row += 4) {
      for (int i = 0; i < 4; ++i) lanes[i] += value(row + i);
    }
    for (; row < end; ++row) lanes[0] += value(row);
    parts[block] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  });
  double total = 0.0;
  for (const double part : parts) total += part;
  return total;
}

void check_targets(const CrossEntropyArgs& a, int64_t rows) {
  std::vector<int64_t> wrong((rows + kBlock - 1) / kBlock, -1);
  each_block(rows, [&](int64_t block, int64_t row, int64_t end) {
    for (; row < end && wrong[block] < 0; ++row) {
      const int64_t t = a.target[row];
      if (!has_class(a, t) && t != a.ignore_index) wrong[block] = row;
    }
  });
  for (const int64_t row : wrong) {
    if (row < 0) continue;
    // pybind11 turns this one into Python's IndexError.
    throw std::out_of_range("target: expected classes in [0, " + std::to_string(a.classes) +
                            ") or ignore_index " + std::to_string(a.ignore_index) + ", got " +
                            std::to_string(a.target[row]) + " at position " + std::to_string(row));
  }
}

// The power of two by which float16 gradients are kept larger: a mean over many rows would leave
// most of them below 6e-5, where float16 loses digits.
float half_unit(double largest, double denominator, bool soft) {
  const double room = std::abs(denominator) / largest * (soft ? 1.0 : kHalfUnit);
  if (!std::isfinite(room) || room <= 0.0) return 1.0f;
  return float(std::exp2(std::min(std::floor(std::log2(room)), 100.0)));
}

// The sizes of a tensor of logits without their classes: those of targets and losses.
std::vector<int64_t> positions(const Checked& x) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.rank);
  sizes.erase(sizes.begin() + (x.rank == 1 ? 0 : 1));
  return sizes;
}

void check_positions(const Checked& t, const Checked& x) {
  const int64_t dim = x.rank == 1 ? 0 : 1;
  bool fits = t.rank == x.rank - 1;
  for (int64_t d = 0; fits && d < t.rank; ++d) fits = t.sizes[d] == x.sizes[d < dim ? d : d + 1];
  if (!fits) refuse(t.name, "expected the shape of ", x.name, " without its classes");
}

void check_forward(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
                   int64_t reduction, double label_smoothing, int64_t wanted) {
  const Checked x(input, "input"), y(target, "target");
  x.floating().ranked(1);
  const bool has_classes = y.type == ScalarType::Long;
  has_classes ? check_positions(y, x) : void(y.floating().shaped(x, x.rank));
  if (weight) {
    const Checked w(*weight, "weight");
    if (w.type != ScalarType::Double) w.floating();
    w.shaped({x.sizes[x.rank == 1 ? 0 : 1]});
  }
  check_range<int64_t>("reduction", reduction, kNone, kSum);
  check_range("label_smoothing", label_smoothing, 0.0, 1.0);
  check_wanted(wanted, has_classes ? kInput : kInput | kTarget);
}

void check_scale(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& unit) {
  const Checked x(grad, "grad"), g(grad_loss, "grad_loss");
  x.floating().ranked(1);
  if (g.type != ScalarType::Double) g.floating();
  if (g.rank > 0) check_positions(g, x);
  if (unit) Checked(*unit, "unit").typed(ScalarType::Float).shaped({1});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(
    const Tensor& input, const Tensor& target_in, const MaybeTensor& weight_in,
    int64_t ignore_index, int64_t reduction, double label_smoothing, bool wide, int64_t wanted) {
  check_forward(input, target_in, weight_in, reduction, label_smoothing, wanted);
  const bool has_classes = target_in.scalar_type() == ScalarType::Long;
  Tensor x = input, target = torch::stable::contiguous(target_in);
  MaybeTensor weight = weight_in;
  if (weight) weight = torch::stable::contiguous(torch::stable::to(*weight, ScalarType::Float));

  CrossEntropyArgs a{};
  a.dtype = dtype_of(x, "input");
  a.ignore_index = ignore_index;
  if (!has_classes) {
    // One layout for two tensors: contiguous.
    x = torch::stable::contiguous(x);
    if (target.scalar_type() != x.scalar_type())
      target = torch::stable::to(target, ScalarType::Float);
    a.soft_dtype = dtype_of(target, "target");
  }
  const Layout layout = layout_of(x);
  a.columns = layout != Layout::rows;
  if (a.columns && View(x).classes >= 1 << 24) {
    refuse("input", "2^24 classes or more need unit stride along the classes");
  }
  const auto operand = [&](const Tensor& t) {
    View v(t);
    if (layout == Layout::turned) v.turn();
    a.batch = v.batch, a.classes = v.classes, a.inner = v.inner;
    return v.operand;
  };
  a.x = operand(x);
  const int64_t rows = a.batch * a.inner;
  if (has_classes) {
    a.target = target.const_data_ptr<int64_t>();
    check_targets(a, rows);
  } else {
    a.soft = operand(target);
  }
  a.label_smoothing = float(label_smoothing);
  a.weight_sum = float(a.classes);
  double largest = 1.0;
  if (weight) {
    a.weight = weight->const_data_ptr<float>();
    a.weight_sum = float(sum_rows(a.classes, [&](int64_t c) { return double(a.weight[c]); }));
    largest = 0.0;
    for (int64_t c = 0; c < a.classes; ++c)
      largest = std::max(largest, std::abs(double(a.weight[c])));
  }
  double denominator = 1.0;
  if (reduction == kMean) {
    denominator = !has_classes ? double(a.classes ? rows : 0) : sum_rows(rows, [&](int64_t row) {
      const int64_t t = a.target[row];
      if (t == ignore_index || !has_class(a, t)) return 0.0;
      return a.weight ? double(a.weight[t]) : 1.0;
    });
  }

  const auto none = [](ScalarType dtype) { return torch::stable::empty({0}, dtype); };
  Tensor grad = wanted & kInput ? new_gradient(x, layout) : none(x.scalar_type());
  Tensor grad_target = none(target_in.scalar_type());
  if (wanted & kTarget) grad_target = torch::stable::empty(target.sizes(), target.scalar_type());
  if (wanted & kInput) {
    a.grad = operand(grad);
    use_large_pages(a.grad.data, size_t(grad.numel()) * grad.element_size());
  }
  if (wanted & kTarget) a.grad_soft = operand(grad_target);
  a.factor = float(1.0 / denominator);
  const bool half = x.scalar_type() == ScalarType::Half || target.scalar_type() == ScalarType::Half;
  Tensor unit = torch::stable::empty({half && wanted ? 1 : 0}, ScalarType::Float);
  if (half && wanted) {
    const float by = half_unit(largest, denominator, !has_classes);
    *unit.mutable_data_ptr<float>() = by;
    a.factor = float(by / denominator);
  }

  Tensor losses = torch::stable::empty(positions(Checked(input, "input")), ScalarType::Float);
  a.loss = losses.mutable_data_ptr<float>();
  cross_entropy(a);
  if (wanted & kTarget) grad_target = torch::stable::to(grad_target, target_in.scalar_type());
  if (reduction != kNone) {
    const double total = sum_rows(rows, [&](int64_t row) { return double(a.loss[row]); });
    losses = torch::stable::empty({}, ScalarType::Float);
    *losses.mutable_data_ptr<float>() = float(total / denominator);
  }
  if (!wide) losses = torch::stable::to(losses, input.scalar_type());
  return {losses, grad, grad_target, unit};
}

// grad times grad_loss / unit, one for each position or one for all, into `out`: a tensor laid out
// as grad is.
void scale_into(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& unit,
                const Tensor& out, Layout layout) {
  ScaleRowsArgs a{};
  a.dtype = dtype_of(grad, "grad");
  a.columns = layout != Layout::rows;
  const auto operand = [&](const Tensor& t) {
    View v(t);
    if (layout == Layout::turned) v.turn();
    a.batch = v.batch, a.classes = v.classes, a.inner = v.inner;
    return v.operand;
  };
  a.x = operand(grad);
  a.out = operand(out);
  if (grad.numel() == 0) return;
  const Tensor given = torch::stable::contiguous(torch::stable::to(grad_loss, ScalarType::Float));
  const float* const factor = given.const_data_ptr<float>();
  std::vector<float> factors(factor, factor + given.numel());
  const float by = unit ? 1.0f / *unit->const_data_ptr<float>() : 1.0f;  // a power of two
  for (float& each : factors) each *= by;
  a.factor = factors.data();
  a.factor_step = factors.size() > 1;
  scale_rows(a);
}

Tensor cross_entropy_bwd(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& unit) {
  check_scale(grad, grad_loss, unit);
  Tensor from = grad;
  const Layout layout = layout_of(from);
  const Tensor out = new_gradient(from, layout);
  scale_into(from, grad_loss, unit, out, layout);
  return out;
}

void cross_entropy_bwd_(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& unit) {
  check_scale(grad, grad_loss, unit);
  Checked(grad, "grad").writable();
  Tensor same = grad;
  const Layout layout = layout_of(same);
  if (same.const_data_ptr() != grad.const_data_ptr()) refuse("grad", "its layout has no kernel");
  scale_into(grad, grad_loss, unit, grad, layout);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_));
}

}  // namespace mmkern
