// Backward of softmax, log-softmax and masked softmax along one dim, from the output y.
//
//   d = sum g * y, dx = y * (g - d)                       log:  dx = g - exp(y) * sum g
//   masked: ds = y * (g - d), dx = scale * ds, and the gradient of a mask or bias is ds summed over
//   what shares an element of it
//
// Floor: two reads and one write of memory. Two passes over a row that stays in cache: d (3
// instructions per kLanes elements), result (5). The gradient of a term is summed in cache, over
// rows that are taken in the order of the term, so it costs its own size once. With dropout y is
// computed again from the input: 30 instructions more, and 130 for the random words.
#include "cpu/parallel.h"
#include "cpu/softmax/rows.isa.h"
#include "cpu/softmax/scores.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// n elements, `stride` apart, as floats.
template <class T>
const float* gather(const T* p, int64_t stride, float* s, int64_t n) {
  if (stride == 1) {
    each_vec(n, [&](int64_t j, int lanes) { store_part(s + j, load_part(p + j, lanes), lanes); });
  } else if (stride == 0) {  // the gradient of a sum
    const Vec v = set1(to_float(*p));
    each_vec(n, [&](int64_t j, int lanes) { store_part(s + j, v, lanes); });
  } else {
    for (int64_t j = 0; j < n; ++j) s[j] = to_float(p[j * stride]);
  }
  return s;
}

inline Mask finite(Vec v) { return equal(v - v, zero()); }

template <class T, bool kLog>
class SoftmaxBackward {
  const SoftmaxArgs& a_;
  const bool masked_ = a_.kind == SoftmaxKind::masked;
  const bool hides_ = a_.mask_kind != MaskKind::none || a_.bias_kind != MaskKind::none;
  const Dropout dropout_{a_.dropout_p, a_.seed};
  const T* const x_ = static_cast<const T*>(a_.x.data);
  const T* const grad_ = static_cast<const T*>(a_.grad.data);
  T* const out_ = static_cast<T*>(a_.out.data);
  const int64_t cols_ = a_.cols;
  const bool unit_ = a_.x.col == 1 && a_.grad.col == 1;
  // A row as float32, with room for what random words are written too much.
  const int64_t padded_ = (cols_ + 5 * kLanes) / kLanes * kLanes;
  const int64_t scratch_ = masked_ || !unit_ ? 4 * padded_ : 0;
  // Of the term: whether a row has one element for all columns, and how many it has.
  const bool per_row_ = a_.term.col == 0;
  const int64_t width_ = a_.term_kind == MaskKind::none ? 0 : per_row_ ? 1 : cols_;

 public:
  explicit SoftmaxBackward(const SoftmaxArgs& a) : a_(a) {}

  void run() const {
    int64_t rows = row_count(a_);
    if (a_.inner > 1) return side_by_side(rows);
    const bool cut = !masked_ && unit_ && a_.out.col == 1 && cols_ > kCachedCols;
    if (!cut || rows > kSharedRows) return in_blocks(rows);
    for (Cursor at(a_, 0); rows > 0; --rows, at.next()) shared_row(at);
  }

 private:
  // Blocks of neighbouring rows; those with the same place in the term are added in one block of
  // sums, in order, or in one for each part of them.
  void in_blocks(int64_t rows) const {
    const int64_t kept = rows / a_.shared, most = smaller(kept, kTaskElements / cols_ + 1);
    const int64_t blocks = (kept + most - 1) / most;
    const int64_t parts = (a_.shared + a_.part_rows - 1) / a_.part_rows;
    parallel_tasks(blocks * parts, [&](int64_t task) {
      const int64_t part = task / blocks, first = task % blocks * most;
      const int64_t count = smaller(most, kept - first);
      float* const sums =
          static_cast<float*>(thread_scratch((count * width_ + scratch_) * sizeof(float)));
      if (width_) memset(sums, 0, count * width_ * sizeof(float));
      const int64_t end = smaller(a_.shared, (part + 1) * a_.part_rows);
      for (int64_t i = part * a_.part_rows; i < end; ++i) {
        Cursor at(a_, i * kept + first);
        for (int64_t k = 0; k < count; ++k, at.next()) {
          row(at, width_ ? sums + k * width_ : nullptr, sums + count * width_);
        }
      }
      if (parts > 1) {
        memcpy(a_.parts + (part * kept + first) * width_, sums, count * width_ * sizeof(float));
      } else if (width_) {
        write_term(first * width_, count * width_, sums);
      }
    });
    if (parts > 1) add_parts(kept * width_, parts);
  }

  void add_parts(int64_t elements, int64_t parts) const {
    parallel_tasks((elements + kChunk - 1) / kChunk, [&](int64_t task) {
      const int64_t first = task * kChunk, n = smaller(kChunk, elements - first);
      float* const sums = static_cast<float*>(thread_scratch(n * sizeof(float)));
      each_vec(n, [&](int64_t j, int lanes) {
        LongSum total;
        for (int64_t p = 0; p < parts;) {
          Vec sum = zero();
          for (const int64_t end = smaller(parts, p + kSumVecs); p < end; ++p) {
            sum = sum + load_part(a_.parts + p * elements + first + j, lanes);
          }
          total.add(sum);
        }
        store_part(sums + j, total.value(), lanes);
      });
      write_term(first, n, sums);
    });
  }

  // Elements first .. first + n of the term's gradient, counted row by row.
  void write_term(int64_t first, int64_t n, const float* sums) const {
    Cursor at(a_, first / width_);
    for (int64_t j = first % width_; n > 0; j = 0, at.next()) {
      const int64_t length = smaller(n, width_ - j);
      const auto write = [&](auto* to) {
        write_row(to + at.term + j * a_.term.col, per_row_ ? 1 : a_.term.col, length, false,
                  [&](int64_t i, int lanes) { return load_part(sums + i, lanes); });
      };
      switch (a_.term_kind) {
        case MaskKind::f32: write(static_cast<float*>(a_.term.data)); break;
        case MaskKind::bf16: write(static_cast<bf16*>(a_.term.data)); break;
        case MaskKind::f16: write(static_cast<f16*>(a_.term.data)); break;
        case MaskKind::none:
        case MaskKind::boolean: break;
      }
      sums += length, n -= length;
    }
  }

  // sums: of the row of the term, or null; s: scratch.
  void row(const Cursor& at, float* sums, float* s) const {
    const T* const g = grad_ + at.grad;
    const T* const y = x_ + at.x;
    if (a_.from_input) {
      weights(at, s);
    } else if (unit_) {
      return row(g, y, at, sums, s);
    } else {
      gather(g, a_.grad.col, s, cols_);
      gather(y, a_.x.col, s + padded_, cols_);
    }
    row<float>(s, s + padded_, at, sums, s);
  }
  template <class S>
  void row(const S* g, const S* y, const Cursor& at, float* sums, float* s) const {
    const float total = row_total(g, y, cols_);
    if (hides_ && !(total - total == 0.0f)) return poisoned_row(at, sums, s);
    write(out_ + at.out, total, sums, [=](int64_t j, int n) {
      return result(load_part(g + j, n), load_part(y + j, n), total);
    });
  }

  static Vec result(Vec g, Vec y, float total) {
    return kLog ? fnma(exp_to<T>(y), set1(total), g) : y * (g - set1(total));
  }

  template <class F>
  void write(T* out, float total, float* sums, F result) const {
    const Vec scale = set1(masked_ ? a_.scale : 1.0f);
    if (sums && per_row_) sums[0] += total - total;  // the weights of a row sum to 1, so ds to 0
    if (!sums || per_row_) {
      if (!out_) return;
      return write_row(out, a_.out.col, cols_, false,
                       [=](int64_t j, int n) { return result(j, n) * scale; });
    }
    const auto add = [=](int64_t j, int n) {
      const Vec ds = result(j, n);
      store_part(sums + j, load_part(sums + j, n) + ds, n);
      return ds * scale;
    };
    if (!out_) return each_vec(cols_, add);
    write_row(out, a_.out.col, cols_, false, add);
  }

  // sum g * y, or sum g: the same however a long row is cut into chunks.
  template <class S>
  static float row_total(const S* g, const S* y, int64_t n) {
    double total = 0.0;
    for (int64_t j = 0; j < n; j += kChunk) {
      total += chunk_total(g + j, y + j, smaller(kChunk, n - j));
    }
    return float(total);
  }
  template <class S>
  static float chunk_total(const S* g, const S* y, int64_t n) {
    const auto add = [&](Vec sum, int64_t j) {
      return kLog ? sum + load(g + j) : fma(load(g + j), load(y + j), sum);
    };
    Vec total = zero();
    int64_t j = 0;
    while (j + kWidth <= n) {
      Vec part[4] = {zero(), zero(), zero(), zero()};
      const int64_t end = smaller(n - kWidth, j + (kSumVecs - 1) * kWidth);
      for (; j <= end; j += kWidth) {
        for (int i = 0; i < 4; ++i) part[i] = add(part[i], j + i * kLanes);
      }
      total = total + ((part[0] + part[1]) + (part[2] + part[3]));
    }
    for (; j + kLanes <= n; j += kLanes) total = add(total, j);
    if (const int left = int(n - j)) {
      const Vec last = load_n(g + j, left);
      total = total + (kLog ? last : last * load_n(y + j, left));
    }
    return reduce_add(total);
  }

  // The gradient after dropout to s, the weights before it to the row of scratch after that.
  void weights(const Cursor& at, float* s) const {
    float* const w = s + padded_;
    float* const factors = w + padded_;
    const float top = row_scores(a_, x_ + at.x, a_.x.col, at, w, factors);
    const float shift = top == -kInf ? 0.0f : top;
    const float total = float(write_exp<T, true>(w, shift, w, static_cast<T*>(nullptr), cols_));
    const Vec factor = set1(total == 0.0f ? 0.0f : 1.0f / total);
    gather(grad_ + at.grad, a_.grad.col, s, cols_);
    element_factors(a_, dropout_, at.out, a_.out.col, cols_, factors);
    each_vec(cols_, [&](int64_t j, int n) {
      store_part(w + j, load_part(w + j, n) * factor, n);
      store_part(s + j, drop(load_part(s + j, n), load_part(factors + j, n)), n);
    });
  }

  // NaN or infinity in a row: hidden elements neither give them nor get them. Their weights are 0
  // otherwise, and need no look at the mask.
  void poisoned_row(const Cursor& at, float* sums, float* s) const {
    float* const y = s + padded_;
    float* const hidden = y + padded_;  // minus infinity where an element is
    if (a_.from_input) {
      weights(at, s);
    } else {
      gather(grad_ + at.grad, a_.grad.col, s, cols_);
      gather(x_ + at.x, a_.x.col, y, cols_);
    }
    memset(hidden, 0, cols_ * sizeof(float));
    row_scores(a_, hidden, 1, at, hidden, hidden + padded_);
    each_vec(cols_, [&](int64_t j, int n) {
      const Mask none = equal(load_part(hidden + j, n), set1(-kInf));
      store_part(s + j, select(none, zero(), load_part(s + j, n)), n);
      store_part(y + j, select(none, zero(), load_part(y + j, n)), n);
    });
    const float total = row_total<float>(s, y, cols_);
    write(out_ + at.out, total, sums, [=](int64_t j, int n) {
      const Mask none = equal(load_part(hidden + j, n), set1(-kInf));
      return select(none, zero(), result(load_part(s + j, n), load_part(y + j, n), total));
    });
  }

  // One of a few long rows, in chunks by whoever is free.
  void shared_row(const Cursor& at) const {
    const T* const g = grad_ + at.grad;
    const T* const y = x_ + at.x;
    const int64_t chunks = (cols_ + kChunk - 1) / kChunk;
    float* const parts = static_cast<float*>(thread_scratch(chunks * sizeof(float)));
    each_chunk(cols_, true, false,
               [&](int64_t c, int64_t j, int64_t n) { parts[c] = chunk_total(g + j, y + j, n); });
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += parts[c];
    const float total = float(sum);
    each_chunk(cols_, true, false, [&](int64_t, int64_t j, int64_t n) {
      write_row(out_ + at.out + j, n, false, [=](int64_t i, int lanes) {
        return result(load_part(g + j + i, lanes), load_part(y + j + i, lanes), total);
      });
    });
  }

  void side_by_side(int64_t rows) const {
    const int64_t blocks = (a_.inner + kWidth - 1) / kWidth, units = rows * blocks;
    const int64_t share = kTaskElements / (cols_ * smaller(kWidth, a_.inner)) + 1;
    parallel_tasks((units + share - 1) / share, [&](int64_t task) {
      Cursor at(a_, task * share / blocks);
      for (int64_t unit = task * share; unit < smaller(units, (task + 1) * share); ++unit) {
        const int64_t first = unit % blocks * kWidth;
        columns(at, first, smaller(kWidth, a_.inner - first));
        if ((unit + 1) % blocks == 0) at.next();
      }
    });
  }

  // Rows first .. first + n side by side, one a lane; all three have unit stride across them.
  void columns(const Cursor& at, int64_t first, int64_t n) const {
    const T* const g = grad_ + at.grad + first;
    const T* const y = x_ + at.x + first;
    T* const out = out_ + at.out + first;
    LongSum sum[4];
    for (int64_t j = 0; j < cols_;) {
      Vec part[4] = {zero(), zero(), zero(), zero()};
      for (const int64_t end = smaller(cols_, j + kSumVecs); j < end; ++j) {
        each_lane_vec(n, [&](int v, int i, int lanes) {
          const Vec grad = load_part(g + j * a_.grad.col + i, lanes);
          part[v] =
              kLog ? part[v] + grad : fma(grad, load_part(y + j * a_.x.col + i, lanes), part[v]);
        });
      }
      for (int v = 0; v < 4; ++v) sum[v].add(part[v]);
    }
    const Vec total[4] = {sum[0].value(), sum[1].value(), sum[2].value(), sum[3].value()};
    for (int v = 0; hides_ && v < 4; ++v) {
      if (any(~finite(total[v]))) return one_by_one(at, first, n);
    }
    const Vec scale = set1(masked_ ? a_.scale : 1.0f);
    for (int64_t j = 0; j < cols_; ++j) {
      each_lane_vec(n, [&](int v, int i, int lanes) {
        const Vec grad = load_part(g + j * a_.grad.col + i, lanes);
        const Vec each = load_part(y + j * a_.x.col + i, lanes);
        const Vec dx =
            kLog ? fnma(exp_to<T>(each), total[v], grad) : each * (grad - total[v]) * scale;
        store_part(out + j * a_.out.col + i, dx, lanes);
      });
    }
  }

  void one_by_one(const Cursor& at, int64_t first, int64_t n) const {
    float* const s = static_cast<float*>(thread_scratch(scratch_ * sizeof(float)));
    for (int64_t i = 0; i < n; ++i) {
      Cursor lane = at;
      lane.to_side(first + i);
      row(lane, nullptr, s);
    }
  }
};

}  // namespace

void softmax_backward(const SoftmaxArgs& a) {
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    if (a.kind == SoftmaxKind::log_softmax) {
      SoftmaxBackward<T, true>(a).run();
    } else {
      SoftmaxBackward<T, false>(a).run();
    }
  })
}

}  // namespace mmkern::MMKERN_ISA
