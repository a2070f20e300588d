// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random bits as a function of a place, so that
// dropout drops the same elements whatever the tiling, thread count or instruction set, and
// backward drops them again without having stored which. mmkern/reference/philox.py defines the
// counters.
#pragma once

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// A few counters side by side, each 32-bit word in a 64-bit lane whose upper half is ignored.
#if defined(__AVX512F__)
constexpr int kCounters = 8;
using Words = __m512i;
inline Words words(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
inline Words counting() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
inline Words add(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high_xor(Words product, Words a, Words b) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), a, b, 0x96);
}
// Words 0, 1, 2, 3 of one counter after another: scale where at least `threshold`, else 0.
inline void store_factors(Words c0, Words c1, Words c2, Words c3, uint32_t threshold, float scale,
                          float* to) {
  const Words low = _mm512_set1_epi64(0xffffffff);
  const Words a = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
  const Words b = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
  const Words first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const Words second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const Words least = _mm512_set1_epi32(int(threshold));
  const Words x = _mm512_permutex2var_epi64(a, first, b);
  const Words y = _mm512_permutex2var_epi64(a, second, b);
  _mm512_storeu_ps(to, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(x, least), set1(scale).v));
  _mm512_storeu_ps(to + 16, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(y, least), set1(scale).v));
}
#elif defined(__AVX2__)
constexpr int kCounters = 4;
using Words = __m256i;
inline Words words(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
inline Words counting() { return _mm256_setr_epi64x(0, 1, 2, 3); }
inline Words add(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high_xor(Words product, Words a, Words b) {
  return _mm256_xor_si256(_mm256_srli_epi64(product, 32), _mm256_xor_si256(a, b));
}
inline void store_factors(Words c0, Words c1, Words c2, Words c3, uint32_t threshold, float scale,
                          float* to) {
  const Words a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const Words b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  const Words even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  const Words least = _mm256_set1_epi32(int(threshold));
  for (int half = 0; half < 2; ++half) {
    const Words x = half ? _mm256_permute2x128_si256(even, odd, 0x31)
                         : _mm256_permute2x128_si256(even, odd, 0x20);
    const Words kept = _mm256_cmpeq_epi32(_mm256_max_epu32(x, least), x);
    _mm256_storeu_ps(to + 8 * half, _mm256_and_ps(_mm256_castsi256_ps(kept), set1(scale).v));
  }
}
#else
constexpr int kCounters = 1;
using Words = uint64_t;
inline Words words(uint64_t x) { return x; }
inline Words counting() { return 0; }
inline Words add(Words a, Words b) { return a + b; }
inline Words multiply(Words a, Words b) { return uint64_t{uint32_t(a)} * uint32_t(b); }
inline Words high_xor(Words product, Words a, Words b) { return (product >> 32) ^ a ^ b; }
inline void store_factors(Words c0, Words c1, Words c2, Words c3, uint32_t threshold, float scale,
                          float* to) {
  const Words all[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; ++i) to[i] = uint32_t(all[i]) >= threshold ? scale : 0.0f;
}
#endif

// Ten rounds on n vectors of counters, 12 instructions a round and vector; two of them hide one
// another's latency.
template <int n>
inline void philox_rounds(Words (&c0)[n], Words (&c1)[n], Words (&c2)[n], Words (&c3)[n],
                          uint64_t seed) {
  const Words m0 = words(0xD2511F53), m1 = words(0xCD9E8D57);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const Words p0 = multiply(c0[i], m0), p1 = multiply(c2[i], m1);
      c0[i] = high_xor(p1, c1[i], words(k0));
      c1[i] = p1;
      c2[i] = high_xor(p0, c3[i], words(k1));
      c3[i] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Four random words for each of kLanes counters that follow no order.
struct PhiloxWords {
  uint32_t word[4][kLanes];
};
inline PhiloxWords philox(const uint64_t (&c0)[kLanes], const uint64_t (&c1)[kLanes],
                          const uint64_t (&c2)[kLanes], const uint64_t (&c3)[kLanes],
                          uint64_t seed) {
  constexpr int n = kLanes / kCounters;
  Words c[4][n];
  memcpy(c[0], c0, sizeof c0), memcpy(c[1], c1, sizeof c1);
  memcpy(c[2], c2, sizeof c2), memcpy(c[3], c3, sizeof c3);
  philox_rounds(c[0], c[1], c[2], c[3], seed);
  PhiloxWords found;
  for (int w = 0; w < 4; ++w) {
    uint64_t lanes[kLanes];
    memcpy(lanes, c[w], sizeof lanes);
    for (int l = 0; l < kLanes; ++l) found.word[w][l] = uint32_t(lanes[l]);
  }
  return found;
}

// Which elements dropout keeps, and what they are multiplied by.
struct Dropout {
  uint32_t threshold;  // kept where a word is at least this; 0: everything is kept
  uint64_t seed;
  float scale;  // 1 / (1 - dropout_p); 0 where nothing is kept
  explicit Dropout(double p, int64_t key)
      : threshold(p < 1.0 ? uint32_t(fmin(nearbyint(p * 4294967296.0), 4294967295.0)) : 0xffffffff),
        seed(uint64_t(key)),
        scale(p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f) {}
  bool on() const { return threshold != 0; }
  float factor(uint32_t word) const { return word >= threshold ? scale : 0.0f; }
};

// factors[j] = scale or 0 for columns [0, n) of one row from column `first` on, a multiple of 4;
// writes up to 4 * kLanes - 1 floats more.
inline void dropout_factors(const Dropout& d, int64_t batch, int64_t head, int64_t row,
                            int64_t first, int64_t n, float* factors) {
  for (int64_t j = 0; j < n; j += 8 * kCounters) {
    Words c0[2], c1[2], c2[2], c3[2];
    for (int i = 0; i < 2; ++i) {
      c0[i] = add(words(uint64_t((first + j) / 4 + i * kCounters)), counting());
      c1[i] = words(uint64_t(row)), c2[i] = words(uint64_t(head)), c3[i] = words(uint64_t(batch));
    }
    philox_rounds(c0, c1, c2, c3, d.seed);
    for (int i = 0; i < 2; ++i) {
      store_factors(c0[i], c1[i], c2[i], c3[i], d.threshold, d.scale,
                    factors + j + 4 * kCounters * i);
    }
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
