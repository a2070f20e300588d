// Steps over a row that softmax and losses share.
#pragma once

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {

template <class T>
inline Vec load_part(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}

constexpr int64_t kNear =
    64;  // so many parts of a sum are added in float32, and sums of them in double

// A sum of any number of vectors.
class LongSum {
  Vec near_ = zero();
  double far_[kLanes];
  int64_t count_ = 0;

  bool folded() const { return count_ >= kNear; }

 public:
  void add(Vec v) {
    near_ = near_ + v;
    if (++count_ % kNear != 0) return;
    float lanes[kLanes];
    store(lanes, near_);
    for (int l = 0; l < kLanes; ++l) far_[l] = (count_ > kNear ? far_[l] : 0.0) + lanes[l];
    near_ = zero();
  }
  void scale(Vec factor) {
    near_ = near_ * factor;
    if (!folded()) return;
    float lanes[kLanes];
    store(lanes, factor);
    for (int l = 0; l < kLanes; ++l) far_[l] *= lanes[l];
  }
  // Of each lane.
  Vec value() const {
    if (!folded()) return near_;
    float lanes[kLanes];
    store(lanes, near_);
    for (int l = 0; l < kLanes; ++l) lanes[l] = float(far_[l] + lanes[l]);
    return load(lanes);
  }
  // Of all lanes.
  double total() const {
    double sum = reduce_add(near_);
    for (int l = 0; folded() && l < kLanes; ++l) sum += far_[l];
    return sum;
  }
};

template <class S>
inline float row_max(const S* x, int64_t n) {
  Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) top[i] = max(top[i], load(x + j + i * kLanes));
  }
  for (; j + kLanes <= n; j += kLanes) top[0] = max(top[0], load(x + j));
  if (const int left = int(n - j)) {
    top[1] = max(top[1], select(first_n(left), load_n(x + j, left), set1(-kInf)));
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// 2^f for f in [-0.5, 0.5], as exact as a result of type T can show: relative error 1e-7 for
// float32, 3e-6 for float16 (which rounds at 5e-4), 1e-4 for bfloat16 (4e-3).
inline Vec exp2_part(Vec f, float) { return exp2_fraction(f); }
inline Vec exp2_part(Vec f, f16) {
  Vec p = set1(9.582853038e-3f);
  p = fma(p, f, set1(5.590642468e-2f));
  p = fma(p, f, set1(2.402409861e-1f));
  return fma(fma(p, f, set1(6.931241934e-1f)), f, set1(1.0f));
}
inline Vec exp2_part(Vec f, bf16) {
  Vec p = fma(set1(5.500893049e-2f), f, set1(2.422109595e-1f));
  return fma(fma(p, f, set1(6.932829272e-1f)), f, set1(1.0f));
}
// e^x for x <= 0, exactly 1 at 0. One step of reduction, unlike exp(): log2(e) is rounded to 1e-8,
// which shows only where e^x is too small to count. 0 below -127 ln 2; NaN for NaN.
template <class T>
inline Vec exp_to(Vec x) {
  x = max(set1(-88.0296919f), x);
  const Vec shifted = fma(x, set1(kLog2e), set1(kExponentMagic));
  const Vec f = fma(x, set1(kLog2e), set1(kExponentMagic) - shifted);
  return exp2_part(f, T{}) * exponent_bits(shifted);
}

}  // namespace mmkern::MMKERN_ISA
