// From dot products to scores: similarity, temperature, soft cap, ALiBi and mask, one row of a
// block at a time, in L1. Each step that a call uses is a pass of one load, one store and a few
// instructions. For attention.isa.cpp.
#pragma once

#include "cpu/attention_rows.h"
#include "cpu/attention_tiles.h"
#include "cpu/mask.h"

namespace mmkern::MMKERN_ISA {
namespace {

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

// Positions of kLanes keys from j on, relative to the query's, without sign.
inline Vec distance_along(const Row& r, int64_t j) {
  return abs(iota() + set1(float(j - r.position)));
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
                       const typename Dot::Word* keys, const float* key_norms, float factor,
                       float* s, int64_t lo, int64_t end) {
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
    store(s + i, (root ? sqrt(square) : square) * set1(-factor));
  }
}

// Dot products [lo, end) of row r with a block of keys -> similarities times `factor`, in place.
template <class Dot>
void measure_similarity(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
                        const typename Dot::Word* keys, const float* key_norms, float factor,
                        float* s, int64_t lo, int64_t end) {
  if (a.similarity >= Similarity::euclidean) {
    measure_distances<Dot>(a, r, q, keys, key_norms, factor, s, lo, end);
  } else if (a.similarity == Similarity::cosine) {
    const Vec both = set1(r.norm * factor);
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, load(s + i) * (load(key_norms + i) * both));
    }
  } else {
    for (int64_t i = lo; i < end; i += kLanes) store(s + i, load(s + i) * set1(factor));
  }
}

// Scaled similarities of row r with the keys from j on -> scores in log2 units, in place. `tanhs`,
// if not null, gets what the soft cap multiplies.
inline void add_biases(const AttentionArgs& a, const Row& r, float* s, float* tanhs, int64_t lo,
                       int64_t end, int64_t j) {
  if (a.softcap != 0.0f) {
    const Vec inverse = set1(1.0f / a.softcap), cap = set1(a.softcap * kLog2e);
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec t = tanh(load(s + i) * inverse);
      if (tanhs) store(tanhs + i, t);
      store(s + i, t * cap);
    }
  }
  if (a.alibi_slopes) {
    const Vec slope = set1(r.slope * kLog2e);
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, fnma(slope, distance_along(r, j + i), load(s + i)));
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
