// One vector vocabulary for all kernels. Vec holds kLanes floats; vec_<isa>.isa.h implements it,
// ops are written once against it. Only *.isa.cpp files include this, inside one MMKERN_ISA each,
// and everything here lives in that namespace so that no code compiled for one instruction set is
// ever linked into another.
//
// Vocabulary (n = number of valid lanes, 0..kLanes):
//   zero() set1(x) iota()                          constants
//   load(p) load_n(p, n) store(p, v) store_n(p, v, n)   float, bf16 or f16 in memory
//   load_n gives 0 beyond n
//   + - * /  fma(a, b, c) = a*b+c   fnma(a, b, c) = c-a*b   max min abs sqrt round
//   max(a, b), min(a, b): b where either is NaN, so max(bound, x) keeps a NaN in x
//   less(a, b) less_equal equal  is_nan  first_n(n)  load_mask(p) load_mask_n(p, n)   give a Mask
//   & | ~ on Masks   any(m)   select(m, a, b) = m ? a : b
//   exponent_bits(x): the bits of x shifted left by 23   reduce_add reduce_max  first_lane
//   transpose(rows): kLanes vectors as a square matrix, in place
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/dtype.h"

// Sets whose dot product of bfloat16 pairs adds to float32: vdpbf16ps, bfdot.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MMKERN_BF16_DOT
#endif

#ifndef MMKERN_ISA
#error "vec.isa.h is for *.isa.cpp files, which are compiled with MMKERN_ISA set"
#endif

namespace mmkern::MMKERN_ISA {

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Scalar conversions, for portable code and tails. Round to nearest even; NaN stays NaN.
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  uint32_t bits;
  float f;
  if (rest >= 0x7c00u) {  // infinity and NaN
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else {  // subnormals too: place the fraction, then scale by 2^112
    bits = sign | rest << 13;
    memcpy(&f, &bits, 4);
    return f * 0x1p112f;
  }
  memcpy(&f, &bits, 4);
  return f;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits =
      nan ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {  // NaN
    out->bits = sign | 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = sign | 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &magnitude, 4);
    out->bits = sign | uint16_t(rounded - 0x3f000000u);
  } else {
    out->bits = sign | uint16_t((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13);
  }
}

}  // namespace mmkern::MMKERN_ISA

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.isa.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.isa.h"
#elif defined(__aarch64__)
#include "cpu/simd/vec_neon.isa.h"
#else
#include "cpu/simd/vec_portable.isa.h"
#endif

namespace mmkern::MMKERN_ISA {

// 2^f for f in [-0.5, 0.5]: degree 5, exact at 0, relative error 1e-7.
inline Vec exp2_slope(Vec f) {  // (2^f - 1) / f
  Vec p = set1(1.326472716e-3f);
  p = fma(p, f, set1(9.671512642e-3f));
  p = fma(p, f, set1(5.550733743e-2f));
  p = fma(p, f, set1(2.402224209e-1f));
  return fma(p, f, set1(6.931469776e-1f));
}
inline Vec exp2_fraction(Vec f) { return fma(exp2_slope(f), f, set1(1.0f)); }
inline Vec exp2m1_fraction(Vec f) { return exp2_slope(f) * f; }

// Adding 1.5 * 2^23 + 127 rounds to an integer n and leaves n + 127, the exponent of 2^n, in the
// low bits.
constexpr float kExponentMagic = 12582912.0f + 127.0f;
inline Vec pow2(Vec n) { return exponent_bits(n + set1(kExponentMagic)); }

// 2^x for x <= 127; 0 at -127 and below; NaN for NaN.
inline Vec exp2(Vec x) {
  x = max(set1(-127.0f), x);
  const Vec shifted = x + set1(kExponentMagic);
  return exp2_fraction(x - (shifted - set1(kExponentMagic))) * exponent_bits(shifted);
}

// e^x for x <= 88, within 1.5 ulp: x - n ln 2 in two exact steps. 0 below -88.03 = -127 ln 2; NaN
// for NaN.
inline Vec exp(Vec x) {
  x = max(set1(-88.0296919f), x);
  const Vec shifted = fma(x, set1(kLog2e), set1(kExponentMagic)),
            n = shifted - set1(kExponentMagic);
  Vec r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  Vec p = set1(1.381460202e-3f);  // degree 6, relative error 3e-9
  p = fma(p, r, set1(8.368715202e-3f));
  p = fma(p, r, set1(4.166838788e-2f));
  p = fma(p, r, set1(1.666652065e-1f));
  p = fma(p, r, set1(4.999999345e-1f));
  return (fma(p * r, r, r) + set1(1.0f)) * exponent_bits(shifted);
}

}  // namespace mmkern::MMKERN_ISA
