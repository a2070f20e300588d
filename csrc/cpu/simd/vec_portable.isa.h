// vec.isa.h for any processor: 4 lanes in the compilers' vector extension, which is SSE on x86.
#pragma once

namespace mmkern::MMKERN_ISA {

constexpr int kLanes = 4;
typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
struct Vec {
  f32x4 v;
};
struct Mask {
  i32x4 m;
};

inline Vec zero() { return {f32x4{0, 0, 0, 0}}; }
inline Vec set1(float x) { return {f32x4{x, x, x, x}}; }
inline Vec iota() { return {f32x4{0, 1, 2, 3}}; }
inline Mask first_n(int n) { return {i32x4{0, 1, 2, 3} < i32x4{n, n, n, n}}; }

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, 16);
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, 16); }
template <class T>
inline Vec load(const T* p) {
  return {f32x4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
inline Vec load_n(const T* p, int n) {
  Vec x = zero();
  for (int i = 0; i < 4 && i < n; ++i) x.v[i] = to_float(p[i]);
  return x;
}
template <class T>
inline void store_n(T* p, Vec x, int n) {
  for (int i = 0; i < 4 && i < n; ++i) from_float(x.v[i], p + i);
}
template <class T>
inline void store(T* p, Vec x) {
  store_n(p, x, 4);
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// A hardware FMA where there is one (Arm); otherwise a product and a sum, each rounded.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return {f32x4{__builtin_fmaf(a.v[0], b.v[0], c.v[0]), __builtin_fmaf(a.v[1], b.v[1], c.v[1]),
                __builtin_fmaf(a.v[2], b.v[2], c.v[2]), __builtin_fmaf(a.v[3], b.v[3], c.v[3])}};
#else
  return {a.v * b.v + c.v};
#endif
}
inline Vec fnma(Vec a, Vec b, Vec c) { return fma({-a.v}, b, c); }
inline Vec select(Mask m, Vec a, Vec b) {
  return {(f32x4)(((i32x4)a.v & m.m) | ((i32x4)b.v & ~m.m))};
}
inline Mask less(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask less_equal(Vec a, Vec b) { return {a.v <= b.v}; }
inline Mask equal(Vec a, Vec b) { return {a.v == b.v}; }
inline Mask is_nan(Vec a) { return {a.v != a.v}; }
inline Vec max(Vec a, Vec b) { return select({a.v > b.v}, a, b); }
inline Vec min(Vec a, Vec b) { return select({a.v < b.v}, a, b); }
inline Vec abs(Vec a) { return {(f32x4)((i32x4)a.v & 0x7fffffff)}; }
inline Vec sqrt(Vec a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
// Adding 1.5 * 2^23 leaves no fraction bits: nearest even for |a| < 2^22, beyond which a is kept
// (large floats below 2^23 may keep a half; no kernel rounds such values). NaN stays.
inline Vec round(Vec a) {
  const f32x4 magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  const Vec rounded = {(a.v + magic) - magic};
  return select(less(abs(a), set1(4194304.0f)), rounded, a);
}
inline Vec exponent_bits(Vec a) { return {(f32x4)((u32x4)a.v << 23)}; }

inline Mask load_mask(const uint8_t* p) { return {i32x4{p[0], p[1], p[2], p[3]} != 0}; }
inline Mask load_mask_n(const uint8_t* p, int n) {
  uint8_t lanes[4] = {};
  if (n > 0) memcpy(lanes, p, n < 4 ? n : 4);
  return load_mask(lanes);
}
inline Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
inline Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
inline Mask operator~(Mask a) { return {~a.m}; }
inline bool any(Mask a) { return (a.m[0] | a.m[1] | a.m[2] | a.m[3]) != 0; }

// Lane j of row i moves to lane i of row j.
inline void transpose(Vec (&rows)[4]) {
  const f32x4 a = rows[0].v, b = rows[1].v, c = rows[2].v, d = rows[3].v;
  for (int i = 0; i < 4; ++i) rows[i].v = f32x4{a[i], b[i], c[i], d[i]};
}

inline float first_lane(Vec a) { return a.v[0]; }
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < 4; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

}  // namespace mmkern::MMKERN_ISA
