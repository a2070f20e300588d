// Masks and biases as attention reads them, a vector at a time: any kind, any stride, never
// expanded. For *.isa.cpp files.
#pragma once

#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

// n elements, `stride` apart; lanes beyond are 0.
template <class T>
inline Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == kLanes ? load(p) : load_n(p, n);
  if (stride == 0) return set1(to_float(*p));
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

template <class T>
inline Vec add_bias(Vec scores, const void* data, int64_t at, int64_t stride, int n, float unit) {
  const Vec bias = load_strided(static_cast<const T*>(data) + at, stride, n);
  return select(equal(bias, set1(-kInf)), bias, fma(bias, set1(unit), scores));
}

// n scores with what a mask holds at element `at` and on: numbers are added, in units of `unit`;
// minus infinity and false hide a score whatever it is, NaN included.
inline Vec apply_mask(MaskKind kind, Vec scores, const void* data, int64_t at, int64_t stride,
                      int n, float unit) {
  switch (kind) {
    case MaskKind::none: return scores;
    case MaskKind::f32: return add_bias<float>(scores, data, at, stride, n, unit);
    case MaskKind::bf16: return add_bias<bf16>(scores, data, at, stride, n, unit);
    case MaskKind::f16: return add_bias<f16>(scores, data, at, stride, n, unit);
    case MaskKind::boolean: break;
  }
  const uint8_t* p = static_cast<const uint8_t*>(data) + at;
  uint8_t lanes[kLanes] = {};
  if (stride != 1) {
    for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
  }
  return select(stride == 1 ? load_mask_n(p, n) : load_mask(lanes), scores, set1(-kInf));
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
