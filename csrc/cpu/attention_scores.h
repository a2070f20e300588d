// From dot products to scores: similarity, temperature, soft cap, ALiBi and mask, one row of a
// block at a time, in L1. Each step that a call uses is a pass of one load, one store and a few
// instructions. For attention.isa.cpp.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/mask.h"

namespace mmkern::MMKERN_ISA {
namespace {

// What a query row needs beside its elements. Keys [lo, hi) are visible, as far as the mask allows.
struct Row {
  int64_t head, index;  // which query: head and position
  int64_t lo, hi;
  float factor;      // score = similarity * factor, in log2 units unless soft-capped
  float norm;        // squared length of the query
  float slope;       // ALiBi, log2 units
  int64_t position;  // of the query on the key axis
  int64_t mask;      // first element of its row of the mask
  float m, l;        // running maximum and sum
};

template <class T>
float squared_norm(const T* x, int64_t n) {
  Vec sum = zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec v = load_n(x + d, n - d < kLanes ? int(n - d) : kLanes);
    sum = fma(v, v, sum);
  }
  return reduce_add(sum);
}

// 1 / max(|x|, 1e-12), by way of the largest element where the squares overflow or underflow.
template <class T>
float reciprocal_norm(const T* x, int64_t n) {
  float square = squared_norm(x, n);
  float top = 1.0f;
  if (!(square > 1e-30f && square < 1e38f)) {
    top = 0.0f;
    for (int64_t d = 0; d < n; ++d) {
      const float v = fabsf(to_float(x[d]));
      if (!(v <= top)) top = v;
    }
    if (top == 0.0f || !(top < kInf)) return top == 0.0f ? 1e12f : top * 0.0f;
    square = 0.0f;
    for (int64_t d = 0; d < n; ++d) square += (to_float(x[d]) / top) * (to_float(x[d]) / top);
  }
  const float norm = sqrtf(square);
  return norm < 1e-12f / top ? 1e12f : 1.0f / norm / top;
}

// tanh by way of expm1, exact near 0 where the score is not capped at all.
inline Vec tanh(Vec x) {
  const Vec a = min(set1(10.0f), abs(x));
  const Vec t = a * set1(2.0f * kLog2e), n = round(t);
  const Vec power = pow2(n);
  const Vec em1 = fma(power, exp2m1_fraction(t - n), power - set1(1.0f));
  const Vec y = em1 / (em1 + set1(2.0f));
  return select(less(x, zero()), zero() - y, y);
}

[[maybe_unused]] float word_element(const float* words, int64_t stride, int64_t d) {
  return words[d * stride];
}
[[maybe_unused]] float word_element(const uint32_t* words, int64_t stride, int64_t d) {
  return to_float(bf16{uint16_t(words[d / 2 * stride] >> (d % 2 * 16))});
}

// Scores outside [first, last) of a row become minus infinity.
inline void hide_edges(float* s, int64_t lo, int64_t end, int64_t first, int64_t last) {
  for (int64_t i = lo; i < end; i += kLanes) {
    if (i >= first && i + kLanes <= last) continue;
    const Vec at = iota();  // lanes are compared as small numbers, exact in float32
    const Mask seen = ~less(at, set1(float(first - i))) & less(at, set1(float(last - i)));
    store(s + i, select(seen, load(s + i), set1(-kInf)));
  }
}

template <class Dot>
float distance2(const typename Dot::Word* q, const typename Dot::Word* k, int64_t dim) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float difference = word_element(q, 1, d) - word_element(k, kPanel, d);
    sum += difference * difference;
  }
  return sum;
}

// |q - k|^2 = |q|^2 + |k|^2 - 2 q.k, except where that loses more than 4 bits: there, element by
// element.
template <class Dot>
void measure_distances(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
                       const typename Dot::Word* keys, const float* key_norms, float* s, int64_t lo,
                       int64_t end) {
  const int64_t words = (a.head_dim + Dot::kPerWord - 1) / Dot::kPerWord;
  const bool root = a.similarity == Similarity::euclidean;
  for (int64_t i = lo; i < end; i += kLanes) {
    const Vec both = set1(r.norm) + load(key_norms + i);
    Vec square = max(zero(), fma(set1(-2.0f), load(s + i), both));
    if (any(less(square, both * set1(1.0f / 16)))) {
      float sums[kLanes], squares[kLanes];
      store(sums, both);
      store(squares, square);
      for (int l = 0; l < kLanes; ++l) {
        if (!(squares[l] < sums[l] / 16)) continue;
        const auto* k = keys + (i + l) / kPanel * kPanel * words + (i + l) % kPanel;
        squares[l] = distance2<Dot>(q, k, a.head_dim);
      }
      square = load(squares);
    }
    store(s + i, (root ? sqrt(square) : square) * set1(-r.factor));
  }
}

// Dot products [lo, end) of row r with the keys from j on -> scores in log2 units, in place.
template <class Dot>
void score_row(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
               const typename Dot::Word* keys, const float* key_norms, float* s, int64_t lo,
               int64_t end, int64_t j) {
  if (a.similarity >= Similarity::euclidean) {
    measure_distances<Dot>(a, r, q, keys, key_norms, s, lo, end);
  } else if (a.similarity == Similarity::cosine) {
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, load(s + i) * (load(key_norms + i) * set1(r.factor)));
    }
  } else {
    for (int64_t i = lo; i < end; i += kLanes) store(s + i, load(s + i) * set1(r.factor));
  }
  if (a.softcap != 0.0f) {
    const Vec inverse = set1(1.0f / a.softcap), cap = set1(a.softcap * kLog2e);
    for (int64_t i = lo; i < end; i += kLanes) store(s + i, tanh(load(s + i) * inverse) * cap);
  }
  if (a.alibi_slopes) {
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec distance = abs(iota() + set1(float(j + i - r.position)));
      store(s + i, fnma(set1(r.slope), distance, load(s + i)));
    }
  }
  if (a.mask_kind != MaskKind::none) {
    for (int64_t i = lo; i < end; i += kLanes) {
      const int64_t left = a.k_len - j - i;  // mask columns that exist from here
      const int n = left < kLanes ? int(left) : kLanes;
      const int64_t at = r.mask + (j + i) * a.mask.col;
      store(s + i, apply_mask(a.mask_kind, load(s + i), a.mask.data, at, a.mask.col, n, kLog2e));
    }
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
