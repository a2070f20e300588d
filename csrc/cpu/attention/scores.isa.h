// From dot products to scores: similarity, temperature, soft cap, ALiBi and mask, one row of a
// block at a time, in L1. Each step that a call uses is a pass of one load, one store and a few
// instructions.
#pragma once

#include "cpu/attention/rows.isa.h"
#include "cpu/attention/tiles.isa.h"

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

// |q - k|^2 = |q|^2 + |k|^2 - 2 q.k, except where that loses more than 4 bits or overflows: there,
// element by element.
template <class Dot>
void measure_distances(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
                       const typename Dot::Word* keys, const float* key_norms, float* s, int64_t lo,
                       int64_t end) {
  const int64_t words = (a.head_dim + Dot::kPerWord - 1) / Dot::kPerWord;
  const bool root = a.similarity == Similarity::euclidean;
  for (int64_t i = lo; i < end; i += kLanes) {
    const Vec both = set1(r.norm) + load(key_norms + i);
    Vec square = max(zero(), fma(set1(-2.0f), load(s + i), both));
    if (any(less(square, both * set1(1.0f / 16)) | equal(both, set1(kInf)))) {
      float sums[kLanes], squares[kLanes];
      store(sums, both);
      store(squares, square);
      for (int l = 0; l < kLanes; ++l) {
        if (!(squares[l] < sums[l] / 16) && sums[l] != kInf) continue;
        const auto* k = keys + (i + l) / kPanel * kPanel * words + (i + l) % kPanel;
        squares[l] = distance2<Dot>(q, k, a.head_dim);
      }
      square = load(squares);
    }
    store(s + i, zero() - (root ? sqrt(square) : square));
  }
}

// Dot products [lo, end) of row r with a block of keys -> similarities, in place.
template <class Dot>
void measure_similarity(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
                        const typename Dot::Word* keys, const float* key_norms, float* s,
                        int64_t lo, int64_t end) {
  if (a.similarity >= Similarity::euclidean) {
    measure_distances<Dot>(a, r, q, keys, key_norms, s, lo, end);
  } else if (a.similarity == Similarity::cosine) {
    const Vec norm = set1(r.norm);
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, load(s + i) * (load(key_norms + i) * norm));
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

// s = s * factor + mask for the columns [lo, end) of a row of the mask, of which those before
// `columns` exist. Minus infinity hides a score whatever it is, NaN included.
template <class M>
void add_mask(const M* mask, int64_t stride, float factor, float* s, int64_t lo, int64_t end,
              int64_t columns) {
  const Vec hidden = set1(-kInf);
  for (int64_t i = lo; i < end; i += kLanes) {
    const int n = columns - i < kLanes ? int(columns - i) : kLanes;
    const M* p = mask + i * stride;
    const Vec bias = load_strided(p, stride, n);
    const Vec score = load(s + i) * set1(factor) + bias;
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

// Similarities of row r with the keys from j on -> scores, in place and in natural units: times
// log2 e, a mask that the dtype holds would be infinite. Each step rounds as the formula does, so
// that what cancels there cancels here. `tanhs`, if not null, gets what the cap multiplies. The
// first pass that a call needs takes the factor along.
inline void add_biases(const AttentionArgs& a, const Row& r, float* s, float* tanhs, int64_t lo,
                       int64_t end, int64_t j) {
  float factor = float(r.factor);
  if (a.softcap != 0.0f) {
    const Vec inverse = set1(1.0f / a.softcap), cap = set1(a.softcap);
    const bool divides = !(a.softcap > 1e-37f && a.softcap < 1e37f);  // the inverse is subnormal
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec score = load(s + i) * set1(factor);
      const Vec t = tanh(divides ? score / cap : score * inverse);
      if (tanhs) store(tanhs + i, t);
      store(s + i, t * cap);
    }
    factor = 1.0f;
  }
  if (a.alibi_slopes) {
    const Vec slope = set1(r.slope);
    for (int64_t i = lo; i < end; i += kLanes) {
      store(s + i, load(s + i) * set1(factor) - slope * distance_along(r, j + i));
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

// Dot products [lo, end) of row r with the block of keys from j on -> scores as they are kept, in
// place: the same bits in forward and backward. `similarity` and `tanhs` get what came on the way,
// unless they are null.
template <class Dot>
inline void measure_scores(const AttentionArgs& a, const Row& r, const typename Dot::Word* q,
                           const typename Dot::Word* keys, const float* key_norms, float* s,
                           float* similarity, float* tanhs, int64_t lo, int64_t end, int64_t j) {
  if (a.similarity != Similarity::dot) {
    measure_similarity<Dot>(a, r, q, keys, key_norms, s, lo, end);
  }
  if (similarity) memcpy(similarity + lo, s + lo, (end - lo) * sizeof(float));
  if (r.scaled) add_biases(a, r, s, tanhs, lo, end, j);
  if (r.lo - j > lo || r.hi - j < end) hide_edges(s, lo, end, r.lo - j, r.hi - j);
}

// Weights are 2^(s * unit - m * unit), with one rounding, where that holds what scores differ by:
// up to 128, whose last bit is 2^-17. Beyond, they are 2^((s - m) * unit).
constexpr float kNear = 128.0f;
inline bool is_near(const Row& r, float m) { return fabsf(m * r.unit) < kNear; }

// The maximum of scores after a block of which it is `top`. One that overflows hides its key.
inline float raised(const Row& r, float top) {
  return top > r.m && top * r.scale != -kInf ? top : r.m;
}
// What is subtracted from scores whose maximum is m: 0 where nothing is visible yet, so that
// weights are 2^-inf = 0; NaN for infinity, as inf - inf is.
inline float base_of(const Row& r, float m) {
  return m == -kInf ? 0.0f : m * r.scale == kInf ? __builtin_nanf("") : m;
}
// The exponent of what a sum relative to `from` is multiplied by to be relative to `to`.
inline float step(const Row& r, float from, float to) {
  if (from == to) return 0.0f;
  return is_near(r, from) && is_near(r, to) ? from * r.unit - to * r.unit : (from - to) * r.unit;
}
// The score, in natural units, that l is relative to.
inline double peak(const Row& r) {
  return is_near(r, r.m) ? double(r.m * r.unit) * kLn2Exact : double(r.m * r.scale);
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
