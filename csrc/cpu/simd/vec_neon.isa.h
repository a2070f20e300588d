// vec.isa.h for 64-bit Arm: 4 lanes in NEON registers. Every such processor multiplies and adds in
// one rounding and converts float16; narrowing to bfloat16 is an instruction from Armv8.6 on.
#pragma once

#include <arm_neon.h>

namespace mmkern::MMKERN_ISA {

constexpr int kLanes = 4;
using f32x4 = float32x4_t;
struct Vec {
  float32x4_t v;
};
struct Mask {
  uint32x4_t m;
};

inline Vec zero() { return {vdupq_n_f32(0.0f)}; }
inline Vec set1(float x) { return {vdupq_n_f32(x)}; }
inline int32x4_t lane_numbers() {
  return vcombine_s32(vcreate_s32(0x100000000u), vcreate_s32(0x300000002u));
}
inline Vec iota() { return {vcvtq_f32_s32(lane_numbers())}; }
inline Mask first_n(int n) { return {vcltq_s32(lane_numbers(), vdupq_n_s32(n))}; }

inline Vec widen(uint16x4_t x, bf16) { return {vreinterpretq_f32_u32(vshll_n_u16(x, 16))}; }
inline Vec widen(uint16x4_t x, f16) { return {vcvt_f32_f16(vreinterpret_f16_u16(x))}; }
inline uint16x4_t narrow(Vec x, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(x.v)); }
inline uint16x4_t narrow(Vec x, bf16) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return vreinterpret_u16_bf16(vcvt_bf16_f32(x.v));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet), 16);
#endif
}

inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, Vec x) { vst1q_f32(p, x.v); }
inline Vec load_n(const float* p, int n) {
  if (n >= 4) return load(p);
  float lanes[4] = {};
  if (n > 0) memcpy(lanes, p, sizeof(float) * n);
  return load(lanes);
}
inline void store_n(float* p, Vec x, int n) {
  if (n >= 4) return store(p, x);
  float lanes[4];
  store(lanes, x);
  if (n > 0) memcpy(p, lanes, sizeof(float) * n);
}
template <class T>
inline Vec load(const T* p) {
  return widen(vld1_u16(&p->bits), T{});
}
template <class T>
inline void store(T* p, Vec x) {
  vst1_u16(&p->bits, narrow(x, T{}));
}
template <class T>
inline Vec load_n(const T* p, int n) {
  if (n >= 4) return load(p);
  T lanes[4] = {};
  if (n > 0) memcpy(lanes, p, sizeof(T) * n);
  return load(lanes);
}
template <class T>
inline void store_n(T* p, Vec x, int n) {
  if (n >= 4) return store(p, x);
  T lanes[4];
  store(lanes, x);
  if (n > 0) memcpy(p, lanes, sizeof(T) * n);
}

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
// vmaxq_f32 would give NaN where either is NaN; here b counts then.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec exponent_bits(Vec a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), 23))};
}

inline Mask less(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
inline Mask less_equal(Vec a, Vec b) { return {vcleq_f32(a.v, b.v)}; }
inline Mask equal(Vec a, Vec b) { return {vceqq_f32(a.v, b.v)}; }
inline Mask is_nan(Vec a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
inline Mask load_mask(const uint8_t* p) {
  uint32_t bytes;
  memcpy(&bytes, p, 4);
  const uint16x4_t words = vget_low_u16(vmovl_u8(vcreate_u8(bytes)));
  return {vcgtq_u32(vmovl_u16(words), vdupq_n_u32(0))};
}
inline Mask load_mask_n(const uint8_t* p, int n) {
  uint8_t lanes[4] = {};
  if (n > 0) memcpy(lanes, p, n < 4 ? n : 4);
  return load_mask(lanes);
}
inline Mask operator&(Mask a, Mask b) { return {vandq_u32(a.m, b.m)}; }
inline Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.m, b.m)}; }
inline Mask operator~(Mask a) { return {vmvnq_u32(a.m)}; }
inline bool any(Mask a) { return vmaxvq_u32(a.m) != 0; }
inline Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m.m, a.v, b.v)}; }

// Lane j of row i moves to lane i of row j: 8 shuffles.
inline void transpose(Vec (&rows)[4]) {
  const float32x4x2_t a = vtrnq_f32(rows[0].v, rows[1].v), b = vtrnq_f32(rows[2].v, rows[3].v);
  for (int i = 0; i < 2; ++i) {
    rows[i].v = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i]));
    rows[i + 2].v = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
  }
}

inline float first_lane(Vec a) { return vgetq_lane_f32(a.v, 0); }
inline float reduce_add(Vec a) {
  const float32x2_t halves = vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
  return vget_lane_f32(halves, 0) + vget_lane_f32(halves, 1);
}
// Of two numbers the larger, as x86 has it: vmaxvq_f32 would make a NaN of one among numbers.
inline float reduce_max(Vec a) { return vmaxnmvq_f32(a.v); }

}  // namespace mmkern::MMKERN_ISA
