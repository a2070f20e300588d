// Sine and cosine of fixed-point turns (see turns.h).
#pragma once

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {

typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef float F32 __attribute__((vector_size(4 * kLanes)));

// a0 b0 a1 b1 ...: the first kLanes of them in a, the rest in b.
inline void interleave(Vec& a, Vec& b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Vec first = {_mm512_permutex2var_ps(a.v, low, b.v)};
  b = {_mm512_permutex2var_ps(a.v, high, b.v)};
  a = first;
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
#else
  const Vec first = {f32x4{a.v[0], b.v[0], a.v[1], b.v[1]}};
  b = {f32x4{a.v[2], b.v[2], a.v[3], b.v[3]}};
  a = first;
#endif
}

// Lanes 1 0 3 2 5 4 ...
inline Vec swap_pairs(Vec a) {
#if defined(__AVX512F__)
  return {_mm512_permute_ps(a.v, 0xb1)};
#elif defined(__AVX2__)
  return {_mm256_permute_ps(a.v, 0xb1)};
#else
  return {f32x4{a.v[1], a.v[0], a.v[3], a.v[2]}};
#endif
}

// Sine and cosine of `top` / 2^32 turns, absolute error below 1e-7: the nearest quarter turn comes
// off in integers, exactly, and polynomials on [-pi/4, pi/4] do the rest.
inline void sincos(U32 top, Vec* sine, Vec* cosine) {
  const U32 quarter = (top + 0x20000000u) >> 30;
  const I32 rest = (I32)(top - (quarter << 30));
  constexpr float kRadians = 1.46291807926715968e-9f;  // pi/2 / 2^30
  const Vec r = Vec{(decltype(Vec::v))__builtin_convertvector(rest, F32)} * set1(kRadians);
  const Vec z = r * r;
  Vec s = fma(set1(-1.9515295891e-4f), z, set1(8.3321608736e-3f));
  s = fma(s, z, set1(-1.6666654611e-1f));
  s = fma(s, z * r, r);
  Vec c = fma(set1(2.443315711809948e-5f), z, set1(-1.388731625493765e-3f));
  c = fma(c, z, set1(4.166664568298827e-2f));
  c = fma(fma(c, z, set1(-0.5f)), z, set1(1.0f));
  const U32 odd = -(quarter & 1u);  // all ones where the two change places
  const U32 bits_s = (U32)s.v, bits_c = (U32)c.v, differ = (bits_s ^ bits_c) & odd;
  sine->v = (decltype(Vec::v))(bits_s ^ differ ^ (quarter & 2u) << 30);
  cosine->v = (decltype(Vec::v))(bits_c ^ differ ^ ((quarter + 1u) & 2u) << 30);
}

// sines[i] and cosines[i] of position * turns[i], for i in [0, n); n is rounded up to kLanes, in
// what is read and in what is written.
inline void sincos_row(const uint64_t* turns, int64_t n, uint64_t position, float* sines,
                       float* cosines) {
  for (int64_t i = 0; i < n; i += kLanes) {
    alignas(64) uint32_t top[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      top[lane] = uint32_t((turns[i + lane] * position) >> 32);
    }
    U32 angle;
    memcpy(&angle, top, sizeof angle);
    Vec s, c;
    sincos(angle, &s, &c);
    store(sines + i, s);
    store(cosines + i, c);
  }
}

}  // namespace mmkern::MMKERN_ISA
