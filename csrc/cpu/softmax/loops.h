// Tensors of any strides as the rows that softmax kernels walk.
#pragma once

#include <optional>
#include <vector>

#include "cpu/check.h"
#include "cpu/softmax/args.h"
#include "cpu/tensor.h"

namespace mmkern {

using MaybeTensor = std::optional<Tensor>;

// What masked softmax asks beside its input x, forward and backward.
inline void check_terms(const Checked& x, const MaybeTensor& mask, const MaybeTensor& bias,
                        double scale, double dropout_p, const MaybeTensor& seed) {
  if (mask) {
    const Checked m(*mask, "mask");
    if (m.type != ScalarType::Bool && m.type != ScalarType::Float) m.typed(x.type);
    m.broadcasts(x);
  }
  if (bias) {
    const Checked b(*bias, "bias");
    if (b.type != ScalarType::Float) b.typed(x.type);
    b.broadcasts(x);
  }
  if (scale - scale != 0.0) refuse("scale", "expected a finite number, got ", scale);
  check_dropout(dropout_p, seed);
}

// Sizes and strides of a tensor, or of one that need not exist; null where there is none.
struct Layout {
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dims = 0;
  Layout() = default;
  Layout(const int64_t* sizes_, const int64_t* strides_, int64_t dims_)
      : sizes(sizes_), strides(strides_), dims(dims_) {}
  explicit Layout(const Tensor& t)
      : sizes(t.sizes().data()), strides(t.strides().data()), dims(t.dim()) {}
  explicit Layout(const MaybeTensor& t) {
    if (t) *this = Layout(*t);
  }
  // In elements of a tensor of `rank` dims that this one broadcasts to: 0 along the dims that it
  // has not, or has once for all.
  int64_t stride(int64_t d, int64_t rank) const {
    const int64_t own = d - (rank - dims);
    return !sizes || own < 0 || sizes[own] == 1 ? 0 : strides[own];
  }
};

// Fills in where rows lie; keeps alive what the arguments point to.
class SoftmaxLoops {
  enum Which { kX, kMask, kBias, kOut, kGrad, kTerm, kOperands };
  // Fewer neighbouring rows are walked one by one: side by side they would fill half a vector at
  // most.
  static constexpr int64_t kFewestColumns = 8;

  std::vector<int64_t> sizes_, strides_[kOperands];
  Layout layouts_[kOperands];
  int64_t rank_;

  int64_t stride(int i, int64_t d) const { return layouts_[i].stride(d, rank_); }

  // One more outer dim, inside the others; joined with the last one where every operand steps
  // through both as through one.
  void add(int64_t d) {
    const int64_t size = layouts_[kX].sizes[d];
    if (size == 1) return;
    bool joins = !sizes_.empty();
    for (int i = 0; joins && i < kOperands; ++i) {
      joins = !layouts_[i].sizes || strides_[i].back() == stride(i, d) * size;
    }
    if (joins) {
      sizes_.back() *= size;
    } else {
      sizes_.push_back(size);
    }
    for (int i = 0; i < kOperands; ++i) {
      if (!layouts_[i].sizes) continue;
      if (joins) {
        strides_[i].back() = stride(i, d);
      } else {
        strides_[i].push_back(stride(i, d));
      }
    }
  }

 public:
  SoftmaxArgs args{};

  // side_by_side: whether rows that are neighbours in memory may be worked on together.
  SoftmaxLoops(int64_t dim, bool side_by_side, Layout x, Layout mask, Layout bias, Layout out,
               Layout grad = {}, Layout term = {})
      : layouts_{x, mask, bias, out, grad, term}, rank_(x.dims) {
    // The dims after `dim` as one, as far as every operand steps through them as through one; the
    // first of them that does not join stays an outer dim, as do all before it.
    int64_t inner = 1, inner_stride[kOperands] = {1, 0, 0, 1, 1, 0}, split = rank_;
    for (int64_t d = rank_ - 1; side_by_side && d > dim; --d, --split) {
      if (x.sizes[d] == 1) continue;
      bool joins = true;
      for (int i = 0; i < kOperands && inner > 1; ++i) {
        joins &= stride(i, d) == inner_stride[i] * inner;
      }
      if (!joins) break;
      for (int i = 0; i < kOperands && inner == 1; ++i) inner_stride[i] = stride(i, d);
      inner *= x.sizes[d];
    }
    if (inner < kFewestColumns || inner_stride[kX] != 1 || inner_stride[kOut] != 1 ||
        (grad.sizes && inner_stride[kGrad] != 1)) {
      inner = 1, split = rank_;
    }
    // What a term's gradient sums over comes first: rows of one place are far apart, and their
    // neighbours, in memory too, are added to neighbouring places.
    args.shared = 1;
    for (int64_t d = 0; term.sizes && d < split; ++d) {
      if (d == dim || term.stride(d, rank_) != 0) continue;
      add(d);
      args.shared *= x.sizes[d];
    }
    for (int64_t d = 0; d < split; ++d) {
      if (d != dim && (!term.sizes || term.stride(d, rank_) != 0)) add(d);
    }
    SoftmaxOperand* const operands[] = {&args.x,   &args.mask, &args.bias,
                                        &args.out, &args.grad, &args.term};
    for (int i = 0; i < kOperands; ++i) {
      if (!layouts_[i].sizes) continue;
      *operands[i] = {nullptr, strides_[i].data(), x.sizes[dim] == 1 ? 1 : stride(i, dim),
                      inner == 1 ? 0 : inner_stride[i]};
    }
    args.outer_dims = int(sizes_.size());
    args.outer_sizes = sizes_.data();
    args.cols = x.sizes[dim];
    args.inner = inner;
    const auto last = [&](int64_t back) { return rank_ < back ? 1 : x.sizes[rank_ - back]; };
    args.columns = last(1), args.rows = last(2), args.heads = last(3);
  }
  SoftmaxLoops(const SoftmaxLoops&) = delete;

  void set_terms(const MaybeTensor& mask, const MaybeTensor& bias) {
    if (mask) {
      args.mask_kind = mask_kind_of(*mask, "mask");
      args.mask.data = const_cast<void*>(mask->const_data_ptr());
    }
    if (bias) {
      args.bias_kind = mask_kind_of(*bias, "bias");
      args.bias.data = const_cast<void*>(bias->const_data_ptr());
    }
  }
  void set_dropout(double p, const MaybeTensor& seed) {
    args.dropout_p = seed ? p : 0.0;
    args.seed = seed ? *seed->const_data_ptr<int64_t>() : 0;
  }
};

}  // namespace mmkern
