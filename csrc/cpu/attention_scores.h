// From dot products to scores: similarity, temperature, soft cap, ALiBi and mask, one row of a
// block at a time, in L1. Each step that a call uses is a pass of one load, one store and a few
// instructions. For attention.isa.cpp.
#pragma once

#include "cpu/attention_rows.h"
#include "cpu/attention_tiles.h"

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

// Dot products [lo, end) of row r with a block of keys -> similarities times `factor`, in place;
// not for Similarity::dot, where that is left to add_biases.
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
  }
}

// n elements, `stride` apart; lanes beyond are 0.
template <class T>
inline Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == kLanes ? load(p) : load_n(p, n);
  if (stride == 0) return set1(to_float(*p));
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

// s = s * factor + mask, in log2 units, for the columns [lo, end) of a row of the mask, of which
// those before `columns` exist. Minus infinity hides a score whatever it is, NaN included.
template <class M>
void add_mask(const M* mask, int64_t stride, float factor, float* s, int64_t lo, int64_t end,
              int64_t columns) {
  const Vec unit = set1(kLog2e), hidden = set1(-kInf);
  for (int64_t i = lo; i < end; i += kLanes) {
    const int n = columns - i < kLanes ? int(columns - i) : kLanes;
    const M* p = mask + i * stride;
    const Vec bias = load_strided(p, stride, n);
    const Vec score = fma(bias, unit, load(s + i) * set1(factor));
    store(s + i, select(equal(bias, hidden), hidden, score));
  }
}
[[maybe_unused]] void add_mask(const uint8_t* mask, int64_t stride, float factor, float* s,
                               int64_t lo, int64_t end, int64_t columns) {
  const Vec hidden = set1(-kInf);
  for (int64_t i = lo; i < end; i += kLanes) {
    const int n = columns - i < kLanes ? int(columns - i) : kLanes;
    const uint8_t* p = mask + i * stride;
    uint8_t lanes[kLanes] = {};
    if (stride != 1) {
      for (int l = 0; l < n; ++l) lanes[l] = p[l * stride];
    }
    const Mask seen = stride != 1   ? load_mask(lanes)
                      : n == kLanes ? load_mask(p)
                                    : load_mask_n(p, n);
    store(s + i, select(seen, load(s + i) * set1(factor), hidden));
  }
}

// Similarities of row r with the keys from j on -> scores in log2 units, in place: times `factor`,
// which is in these units too unless there is a soft cap. `tanhs`, if not null, gets what the cap
// multiplies. The first pass that a call needs takes the factor along.
inline void add_biases(const AttentionArgs& a, const Row& r, float factor, float* s, float* tanhs,
                       int64_t lo, int64_t end, int64_t j) {
  if (a.softcap != 0.0f) {
    const Vec inverse = set1(factor / a.softcap), cap = set1(a.softcap * kLog2e);
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec t = tanh(load(s + i) * inverse);
      if (tanhs) store(tanhs + i, t);
      store(s + i, t * cap);
    }
    factor = 1.0f;
  }
  if (a.alibi_slopes) {
    const Vec slope = set1(r.slope * kLog2e);
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, fnma(slope, distance_along(r, j + i), load(s + i) * set1(factor)));
    }
    factor = 1.0f;
  }
  const auto mask = [&](const auto* data) {
    add_mask(data + r.mask + j * a.mask.col, a.mask.col, factor, s, lo, end, a.k_len - j);
  };
  switch (a.mask_kind) {
    case MaskKind::boolean: return mask(static_cast<const uint8_t*>(a.mask.data));
    case MaskKind::f32: return mask(static_cast<const float*>(a.mask.data));
    case MaskKind::bf16: return mask(static_cast<const bf16*>(a.mask.data));
    case MaskKind::f16: return mask(static_cast<const f16*>(a.mask.data));
    case MaskKind::none: break;
  }
  if (factor == 1.0f) return;
  for (int64_t i = lo; i < end; i += kLanes) store(s + i, load(s + i) * set1(factor));
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
