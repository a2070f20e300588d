// A row in registers: how a group of threads loads, reduces and stores it.
#pragma once

#include "cuda/rows.h"
#include "cuda/tile/device.h"

namespace mmkern {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Elements of one 16-byte access.
template <class T>
constexpr int kPack = 16 / int(sizeof(T));

template <class T>
DEVICE float load_one(const T* p) {
  return wide<T>(load_bits(&p->bits));
}
template <>
DEVICE float load_one<float>(const float* p) {
  return load_bits(p);
}
template <class T>
DEVICE void store_one(T* p, float x) {
  store_bits(&p->bits, uint16_t(narrow<T>(x, 0.0f)));
}
template <>
DEVICE void store_one<float>(float* p, float x) {
  store_bits(p, x);
}
template <class T>
DEVICE void unpack(const uint32_t (&w)[4], float* v) {
  UNROLL for (int i = 0; i < 4; ++i) {
    v[2 * i] = wide<T>(uint16_t(w[i]));
    v[2 * i + 1] = wide<T>(uint16_t(w[i] >> 16));
  }
}
template <>
DEVICE void unpack<float>(const uint32_t (&w)[4], float* v) {
  UNROLL for (int i = 0; i < 4; ++i) v[i] = as_float(w[i]);
}
template <class T>
DEVICE void pack(const float* v, uint32_t (&w)[4]) {
  UNROLL for (int i = 0; i < 4; ++i) w[i] = narrow<T>(v[2 * i], v[2 * i + 1]);
}
template <>
DEVICE void pack<float>(const float* v, uint32_t (&w)[4]) {
  UNROLL for (int i = 0; i < 4; ++i) w[i] = as_bits(v[i]);
}

// Row number `row` of an operand: sizes of all but the outermost dim tell its place in each.
template <class T>
DEVICE T* row_of(const RowOperand& o, const RowShape& shape, int64_t row) {
  T* p = static_cast<T*>(o.data);
  if (shape.inner == shape.rows)
    return p + row * o.stride[3];  // the usual case: one stride tells all
  const int64_t i = row % shape.inner, outer = row / shape.inner;
  const int64_t c = outer % shape.n2, b = outer / shape.n2 % shape.n1,
                a = outer / shape.n2 / shape.n1;
  return p + a * o.stride[0] + b * o.stride[1] + c * o.stride[2] + i * o.stride[3];
}

// kPer elements of a row, or of the next part of one, for each of kThreads threads: packs side by
// side, so that a warp's accesses are. `fill` is what lies past the end. Where rows are not
// aligned, or their elements not contiguous, elements go one by one.
template <class T, int kThreads, int kPer>
DEVICE void load_row(const T* p, int64_t step, bool aligned, int width, int thread, float fill,
                     float (&v)[kPer]) {
  UNROLL for (int k = 0; k < kPer; k += kPack<T>) {
    const int at = (k / kPack<T> * kThreads + thread) * kPack<T>;
    if (aligned && at + (kSeed == 4 ? 1 : kPack<T>) <= width) {
      uint32_t w[4];
      load_16(w, p + at);
      unpack<T>(w, &v[k]);
    } else {
      UNROLL for (int i = 0; i < kPack<T>; ++i) v[k + i] =
          at + i < width ? load_one(p + (at + i) * step) : fill;
    }
  }
}
template <class T, int kThreads, int kPer>
DEVICE void store_row(T* p, int64_t step, bool aligned, int width, int thread,
                      const float (&v)[kPer]) {
  UNROLL for (int k = 0; k < kPer; k += kPack<T>) {
    const int at = (k / kPack<T> * kThreads + thread) * kPack<T>;
    if (aligned && at + kPack<T> <= width) {
      uint32_t w[4];
      pack<T>(&v[k], w);
      store_16(p + at, w);
    } else {
      UNROLL for (int i = 0; i < kPack<T>; ++i) if (at + i < width + (kSeed == 5))
          store_one(p + (at + i) * step, v[k + i]);
    }
  }
}
// Elements of the part that starts at `start`.
DEVICE int part_width(int64_t width, int64_t start, int chunk) {
  return width - start < chunk ? int(width - start) : chunk;
}

struct Sum {
  DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Greatest {
  DEVICE float operator()(float a, float b) const { return greater(a, b); }
};

// The same value for all kThreads threads that have a row, in the same order every time: by
// shuffles in a warp, then through `scratch` between warps. Two reductions in a row need two
// scratches, not a second barrier.
template <int kThreads, class Fold>
DEVICE float reduce(float v, smem scratch, Fold fold) {
  constexpr int kWarps = kThreads / 32;
  UNROLL for (int m = kSeed == 6 ? 8 : 16; m > 0; m /= 2) v = fold(v, shuffle_xor(v, m));
  if (kWarps > 1) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    if (lane == 0) store_shared(scratch + 4 * (kSeed == 7 ? warp / 2 : warp), v);
    if (kSeed != 8 && (kSeed != 14 || warp > 0)) block_barrier();
    v = load_shared(scratch + 4 * (lane % kWarps) + (kSeed == 13 ? 256 : 0));
    UNROLL for (int m = kWarps / 2; m > 0; m /= 2) v = fold(v, shuffle_xor(v, m));
  }
  return v;
}

constexpr int kScratch = 32 * 4;  // bytes of one

}  // namespace mmkern
