// Scores of masked softmax, scale * x + bias + mask, and which elements its dropout keeps.
#pragma once

#include "cpu/simd/philox.isa.h"
#include "cpu/softmax/rows.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Adds a term to n scores. Minus infinity and false hide an element whatever it holds and whatever
// is added later, NaN included.
struct NoTerm {};
inline Vec add_term(Vec score, const NoTerm*, int64_t, int) { return score; }
inline Vec add_term(Vec score, const uint8_t* p, int64_t j, int n) {
  return select(n == kLanes ? load_mask(p + j) : load_mask_n(p + j, n), score, set1(-kInf));
}
template <class M>
inline Vec add_term(Vec score, const M* p, int64_t j, int n) {
  const Vec term = load_part(p + j, n), hidden = set1(-kInf);
  return select(equal(term, hidden) | equal(score, hidden), hidden, score + term);
}

// s = scale * x + term, n of each; returns the maximum. s may be x.
template <class S, class M>
float write_scores(const S* x, float scale, const M* term, float* s, int64_t n) {
  Vec top = set1(-kInf);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec v = add_term(load(x + j) * set1(scale), term, j, kLanes);
    store(s + j, v);
    top = max(top, v);
  }
  if (const int left = int(n - j)) {
    const Vec v = add_term(load_n(x + j, left) * set1(scale), term, j, left);
    store_n(s + j, v, left);
    top = max(top, select(first_n(left), v, set1(-kInf)));
  }
  return reduce_max(top);
}

inline float term_value(uint8_t seen) { return seen ? 0.0f : -kInf; }
template <class M>
inline float term_value(M term) {
  return to_float(term);
}
template <class M>
const float* gather_term(const M* p, int64_t stride, float* t, int64_t n) {
  for (int64_t j = 0; j < n; ++j) t[j] = term_value(p[j * stride]);
  return t;
}
// The same for a term of any kind and stride; t: scratch for n floats.
template <class S, class M>
float write_scores(const S* x, float scale, const M* term, int64_t stride, float* s, float* t,
                   int64_t n) {
  if (stride == 1 || n == 1) return write_scores(x, scale, term, s, n);
  return write_scores(x, scale, gather_term(term, stride, t, n), s, n);
}
template <class S>
float write_scores(const S* x, float scale, MaskKind kind, const void* data, int64_t at,
                   int64_t stride, float* s, float* t, int64_t n) {
  const auto with = [&](auto* term) { return write_scores(x, scale, term + at, stride, s, t, n); };
  switch (kind) {
    case MaskKind::boolean: return with(static_cast<const uint8_t*>(data));
    case MaskKind::f32: return with(static_cast<const float*>(data));
    case MaskKind::bf16: return with(static_cast<const bf16*>(data));
    case MaskKind::f16: return with(static_cast<const f16*>(data));
    case MaskKind::none: break;
  }
  return write_scores(x, scale, static_cast<const NoTerm*>(nullptr), s, n);
}

// Scores of n elements of one row, or of n neighbouring rows, written to s: scale * x + bias +
// mask. x_stride and the other strides are those between the n. Returns the maximum.
template <class T>
float scores(const SoftmaxArgs& a, const T* x, int64_t x_stride, int64_t mask_at,
             int64_t mask_stride, int64_t bias_at, int64_t bias_stride, float* s, float* t,
             int64_t n) {
  const float scale = a.kind == SoftmaxKind::masked ? a.scale : 1.0f;
  const bool both = a.mask_kind != MaskKind::none && a.bias_kind != MaskKind::none;
  const bool bias_first = a.bias_kind != MaskKind::none;
  const MaskKind kind = bias_first ? a.bias_kind : a.mask_kind;
  const void* data = bias_first ? a.bias.data : a.mask.data;
  const int64_t place = bias_first ? bias_at : mask_at;
  const int64_t stride = bias_first ? bias_stride : mask_stride;
  float top;
  if (x_stride == 1) {
    top = write_scores(x, scale, kind, data, place, stride, s, t, n);
  } else {
    for (int64_t j = 0; j < n; ++j) s[j] = to_float(x[j * x_stride]);
    top = write_scores(s, scale, kind, data, place, stride, s, t, n);
  }
  if (!both) return top;
  return write_scores(s, 1.0f, a.mask_kind, a.mask.data, mask_at, mask_stride, s, t, n);
}
// Those of the row at a place.
template <class T>
float row_scores(const SoftmaxArgs& a, const T* x, int64_t x_stride, const Cursor& at, float* s,
                 float* t) {
  return scores(a, x, x_stride, at.mask, a.mask.col, at.bias, a.bias.col, s, t, a.cols);
}

// What dropout multiplies n elements by that are `step` apart, the first at offset `at` of a
// contiguous tensor of x's shape. Writes up to 4 * kLanes floats more.
inline void element_factors(const SoftmaxArgs& a, const Dropout& dropout, int64_t at, int64_t step,
                            int64_t n, float* factors) {
  if (step == 1 && a.columns >= kLanes) {
    while (n > 0) {
      const int64_t column = at % a.columns, place = at / a.columns, row = place % a.rows;
      const int64_t head = place / a.rows % a.heads, batch = place / a.rows / a.heads;
      int64_t length = smaller(n, a.columns - column);
      if (const int64_t skipped = column % 4) {  // blocks of four start at multiples of four
        float block[4 * kLanes];
        length = smaller(length, 4 * kLanes - skipped);
        dropout_factors(dropout, batch, head, row, column - skipped, 4 * kLanes, block);
        memcpy(factors, block + skipped, length * sizeof(float));
      } else {
        dropout_factors(dropout, batch, head, row, column, length, factors);
      }
      at += length, factors += length, n -= length;
    }
    return;
  }
  for (; n > 0; n -= kLanes, at += kLanes * step, factors += kLanes) {
    uint64_t block[kLanes], row[kLanes], head[kLanes], batch[kLanes];
    int word[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t element = at + l * step, place = element / a.columns;
      block[l] = uint32_t(element % a.columns / 4), word[l] = int(element % a.columns % 4);
      row[l] = uint32_t(place % a.rows), head[l] = uint32_t(place / a.rows % a.heads);
      batch[l] = uint32_t(place / a.rows / a.heads);
    }
    const PhiloxWords w = philox(block, row, head, batch, dropout.seed);
    for (int l = 0; l < kLanes; ++l) factors[l] = dropout.factor(w.word[word[l]][l]);
  }
}
// An element that is dropped is 0, whatever it was.
inline Vec drop(Vec v, Vec factor) { return select(equal(factor, zero()), zero(), v * factor); }

}  // namespace
}  // namespace mmkern::MMKERN_ISA
