// Register tiles of the attention kernel: outer products of a few rows with a few vectors of
// columns, and the packing that lays keys and values out for them.
//
// Floor: each fused multiply-add instruction does kLanes products, one instruction a cycle.
// kTileRows x kTileVecs accumulators hide its latency of 4 and need kTileVecs + kTileRows loads per
// kTileRows * kTileVecs instructions, so loads (one or two a cycle) never bound.
#pragma once

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6,
              kTileVecs = 4;  // 24 accumulators, 4 columns, 1 broadcast of 32 registers
#else
constexpr int kTileRows = 6,
              kTileVecs = 2;  // 12 accumulators, 2 columns, 1 broadcast of 16 registers
#endif
constexpr int kPanel = kTileVecs * kLanes;  // keys side by side in a panel of packed keys

// Float32 arithmetic: a word is one float.
struct F32Dot {
  using Word = float;
  static constexpr int kPerWord = 1;
  struct B {
    Vec v;
  };
  static B load(const Word* p) { return {MMKERN_ISA::load(p)}; }
  static Vec fma(Word a, B b, Vec acc) { return MMKERN_ISA::fma(set1(a), b.v, acc); }
};

#if defined(MMKERN_BF16_DOT)
// bfloat16 products summed in float32: a word is two neighbours along the summed dimension.
struct Bf16Dot {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
#if defined(__aarch64__)
  struct B {
    bfloat16x8_t v;
  };
  static B load(const Word* p) { return {vreinterpretq_bf16_u32(vld1q_u32(p))}; }
  static Vec fma(Word a, B b, Vec acc) {
    return {vbfdotq_f32(acc.v, vreinterpretq_bf16_u32(vdupq_n_u32(a)), b.v)};
  }
#else
  struct B {
    __m512bh v;
  };
  static B load(const Word* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static Vec fma(Word a, B b, Vec acc) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_set1_epi32(int(a)), b.v)};
  }
#endif
};

// out[i] = (even[i], odd[i]) for i < n, zeros up to kLanes; a null row is zeros.
inline void interleave(const bf16* even, const bf16* odd, int n, uint32_t* out) {
#if defined(__aarch64__)
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t low = even && i < n ? even[i].bits : 0, high = odd && i < n ? odd[i].bits : 0;
    out[i] = low | high << 16;
  }
#else
  const __mmask16 m = first_n(n).m;
  const __m256i none = _mm256_setzero_si256();
  const __m512i low = _mm512_cvtepu16_epi32(even ? _mm256_maskz_loadu_epi16(m, even) : none);
  const __m512i high = _mm512_cvtepu16_epi32(odd ? _mm256_maskz_loadu_epi16(m, odd) : none);
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
}
#endif

// Float32 arithmetic on columns read as stored, unpacked: for the few rows of a decoding step.
template <class T>
struct StoredDot {
  using Word = float;
  using B = F32Dot::B;
  static B load(const T* p) { return {MMKERN_ISA::load(p)}; }
  static Vec fma(Word a, B b, Vec acc) { return F32Dot::fma(a, b, acc); }
};

// acc[r][v] += sum over k < depth of a[r][k] * b[k][v], where a[r][k] lies at r * a_row + k, or
// with kAcross at k * a_row + r.
template <class Dot, bool kAcross = false, int kRows, int kVecs, class Column>
inline void outer_product(const typename Dot::Word* a, int64_t a_row, const Column* b,
                          int64_t b_row, int64_t depth, Vec (&acc)[kRows][kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    typename Dot::B column[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) column[v] = Dot::load(b + k * b_row + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = Dot::fma(a[kAcross ? k * a_row + r : r * a_row + k], column[v], acc[r][v]);
      }
    }
  }
}

// out[r][v] = sum over k of a[r][k] * b[k][v]
template <class Dot, int kRows, int kVecs>
void product_tile(const typename Dot::Word* a, int64_t a_row, const typename Dot::Word* b,
                  int64_t b_row, int64_t depth, float* out, int64_t out_row) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
  }
  outer_product<Dot>(a, a_row, b, b_row, depth, acc);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + r * out_row + v * kLanes, acc[r][v]);
  }
}

// out[r][v] = out[r][v] * factor[r] + sum over k of a[r][k] * b[k][v]. The sum starts at zero:
// adding a block's sum to the total once keeps the rounding error of long rows that of one block.
template <class Dot, int kRows, int kVecs, class Column>
void update_tile(const typename Dot::Word* a, int64_t a_row, const Column* b, int64_t b_row,
                 int64_t depth, const float* factor, float* out, int64_t out_row) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
  }
  outer_product<Dot>(a, a_row, b, b_row, depth, acc);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = out + r * out_row + v * kLanes;
      store(to, fma(load(to), set1(factor[r]), acc[r][v]));
    }
  }
}

// out[r][v] += sum over k of a[r][k] * b[k][v], for run-time rows and vecs.
template <class Dot, bool kAcross>
struct AddTile {
  const typename Dot::Word* a;
  int64_t a_row;
  const typename Dot::Word* b;
  int64_t b_row, depth;
  float* out;
  int64_t out_row;
  template <int kRows, int kVecs>
  void run() const {
    Vec acc[kRows][kVecs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
    }
    outer_product<Dot, kAcross>(a, a_row, b, b_row, depth, acc);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* to = out + r * out_row + v * kLanes;
        store(to, load(to) + acc[r][v]);
      }
    }
  }
};

// Calls f.template operator()<rows, vecs>() for run-time rows in 1..kTileRows and vecs
// in 1..kTileVecs.
template <int kRows = kTileRows, int kVecs = kTileVecs, class F>
inline void with_tile(int rows, int vecs, const F& f) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_tile<kRows - 1, kVecs>(rows, vecs, f);
  }
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) return with_tile<kRows, kVecs - 1>(rows, vecs, f);
  }
  f.template run<kRows, kVecs>();
}

// Copies a row of `dim` elements into words, padded with zeros to `words`.
template <class Dot, class T>
inline void pack_row(const T* row, int64_t dim, typename Dot::Word* out, int64_t words) {
  if constexpr (Dot::kPerWord == 1) {
    for (int64_t d = 0; d < words; d += kLanes) {
      const int n = dim - d < kLanes ? int(dim - d) : kLanes;
      store_n(out + d, load_n(row + d, n), words - d < kLanes ? int(words - d) : kLanes);
    }
  } else {
    if (dim % 2) out[words - 1] = 0;
    memcpy(out, row, dim * sizeof(T));
  }
}

// kLanes words of `row` from word w, as bits in float lanes, zeros beyond the end of the row.
template <class Dot, class T>
inline Vec load_words(const T* row, int64_t dim, int64_t w) {
  constexpr int per = Dot::kPerWord;
  if constexpr (per == 1) {
    const int64_t left = dim - w;
    return left >= kLanes ? load(row + w) : load_n(row + w, int(left));
  } else {
    const float* p = reinterpret_cast<const float*>(row) + w;
    const int64_t left = dim - w * per;
    if (left >= kLanes * per) return load(p);
    float lanes[kLanes] = {};
    memcpy(lanes, p, left * sizeof(T));
    return load(lanes);
  }
}

// Keys [0, keys) of `dim` elements -> panels [keys / kPanel][words][kPanel]; keys past the end are
// zeros.
template <class Dot, class T>
void pack_keys(const T* k, int64_t k_row, int64_t keys, int64_t dim, typename Dot::Word* out) {
  const int64_t words = (dim + Dot::kPerWord - 1) / Dot::kPerWord;
  for (int64_t j = 0; j < keys; j += kLanes) {
    float* panel = reinterpret_cast<float*>(out) + j / kPanel * kPanel * words + j % kPanel;
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = j + i < keys ? load_words<Dot>(k + (j + i) * k_row, dim, w) : zero();
      }
      transpose(rows);
      const int n = words - w < kLanes ? int(words - w) : kLanes;
      for (int i = 0; i < n; ++i) store(panel + (w + i) * kPanel, rows[i]);
    }
  }
}

// True where every one of the n elements is finite.
template <class T>
inline bool all_finite(const T* row, int64_t n) {
  Vec bad = zero();  // x * 0 is 0, or NaN for NaN and infinities
  for (int64_t d = 0; d < n; d += kLanes) {
    bad = fma(n - d < kLanes ? load_n(row + d, int(n - d)) : load(row + d), zero(), bad);
  }
  return !any(is_nan(bad));
}

// Values [0, keys) -> [keys / kPerWord][padded], columns padded with zeros; rows that hold a NaN or
// an infinity become zeros and are listed in `bad`, in order; returns how many. Keys are padded to
// whole words.
template <class Dot, class T>
int64_t pack_values(const T* v, int64_t v_row, int64_t keys, int64_t dim, int64_t padded,
                    typename Dot::Word* out, int32_t* bad) {
  int64_t bads = 0;
  constexpr int per = Dot::kPerWord;
  for (int64_t j = 0; j < keys; j += per) {
    typename Dot::Word* to = out + j / per * padded;
    if constexpr (per == 1) {
      Vec nan = zero();
      for (int64_t d = 0; d < padded; d += kLanes) {
        const T* from = v + j * v_row + d;
        const Vec x = dim - d < kLanes ? load_n(from, int(dim - d)) : load(from);
        nan = fma(x, zero(), nan);
        store(to + d, x);
      }
      if (any(is_nan(nan))) {
        bad[bads++] = int32_t(j);
        memset(to, 0, padded * sizeof(*to));
      }
    } else {
      const T* row[2] = {v + j * v_row, j + 1 < keys ? v + (j + 1) * v_row : nullptr};
      for (int i = 0; i < 2; ++i) {
        if (!row[i] || all_finite(row[i], dim)) continue;
        bad[bads++] = int32_t(j + i);
        row[i] = nullptr;
      }
      for (int64_t d = 0; d < padded; d += kLanes) {
        const int n = dim - d < kLanes ? int(dim - d) : kLanes;
        interleave(row[0] ? row[0] + d : nullptr, row[1] ? row[1] + d : nullptr, n, to + d);
      }
    }
  }
  return bads;
}

// Arguments of a register tile, whose size with_tile picks.
template <class Dot>
struct ScoreTile {
  const typename Dot::Word* q;
  int64_t q_row, words;
  const typename Dot::Word* k;
  float* scores;
  int64_t scores_row;
  template <int kRows, int kVecs>
  void run() const {
    product_tile<Dot, kRows, kVecs>(q, q_row, k, kPanel, words, scores, scores_row);
  }
};
template <class Dot, class Column>
struct ValueTile {
  const typename Dot::Word* p;
  int64_t p_row;
  const Column* v;
  int64_t v_row, depth;
  const float* rescale;
  float* o;
  int64_t o_row;
  template <int kRows, int kVecs>
  void run() const {
    update_tile<Dot, kRows, kVecs>(p, p_row, v, v_row, depth, rescale, o, o_row);
  }
};
// Scores of kRows queries with kLanes unpacked keys, of which the first `keys` exist.
template <class T>
struct DirectScoreTile {
  const float* q;
  int64_t dim;
  const T* k;
  int64_t k_row, keys;
  float* scores;
  int64_t scores_row;
  template <int kRows, int kVecs>
  void run() const {
    Vec dots[kRows][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      Vec sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = zero();
      for (int64_t d = 0; i < keys && d < dim; d += kLanes) {
        const Vec key = load(k + i * k_row + d);
        for (int r = 0; r < kRows; ++r) sum[r] = fma(key, load(q + r * dim + d), sum[r]);
      }
      for (int r = 0; r < kRows; ++r) dots[r][i] = sum[r];
    }
    for (int r = 0; r < kRows; ++r) {
      transpose(dots[r]);
      Vec sum = dots[r][0];
      for (int i = 1; i < kLanes; ++i) sum = sum + dots[r][i];
      store(scores + r * scores_row, sum);
    }
  }
};

}  // namespace
}  // namespace mmkern::MMKERN_ISA
