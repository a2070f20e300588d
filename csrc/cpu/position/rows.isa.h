// What the position kernels do with one row.
#pragma once

#include "cpu/position/forward.h"
#include "cpu/simd/philox.isa.h"
#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Room for the dropout factors of a row.
inline int64_t factor_room(int64_t dim) { return dim + 4 * kMaxLanes; }

// What dropout multiplies the elements of row `row` by, counted over all leading dims.
inline void keep_row(const Dropout& d, const KeepPlaces& keep, int64_t row, int64_t length,
                     int64_t dim, float* factors) {
  const int64_t lead = row / length;
  dropout_factors(d, lead / keep.heads, lead % keep.heads, row % length, 0, dim, factors);
}

// sum += row, times factors if there are any. Each element: one read of row, and sum in L1.
template <class T>
void add_to_sum(const T* row, const float* factors, float* sum, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    const int n = dim - j < kLanes ? int(dim - j) : kLanes;
    Vec v = n == kLanes ? load(row + j) : load_n(row + j, n);
    if (factors) v = v * load(factors + j);
    store(sum + j, load(sum + j) + v);  // sum has room for whole vectors
  }
}

// A sum of any number of rows: 64 in float32, and what these add up to in double.
class RowSum {
  static constexpr int64_t kNear = 64;
  float* const near_;
  double* const far_;
  const int64_t dim_;
  int64_t count_ = 0;

 public:
  // In floats of scratch, 64-byte aligned.
  static int64_t room(int64_t dim) { return 3 * (dim + kMaxLanes + 15) / 16 * 16; }
  RowSum(float* scratch, int64_t dim)
      : near_(scratch + 2 * (dim + kMaxLanes)),
        far_(reinterpret_cast<double*>(scratch)),
        dim_(dim) {
    memset(near_, 0, (dim + kMaxLanes) * sizeof(float));
  }
  template <class T>
  void add(const T* row, const float* factors) {
    add_to_sum(row, factors, near_, dim_);
    if (++count_ % kNear != 0) return;
    for (int64_t j = 0; j < dim_; ++j) far_[j] = (count_ > kNear ? far_[j] : 0.0) + near_[j];
    memset(near_, 0, dim_ * sizeof(float));
  }
  const float* value() {
    for (int64_t j = 0; count_ >= kNear && j < dim_; ++j) near_[j] = float(far_[j] + near_[j]);
    return near_;
  }
};

template <class T>
void write_sum(const float* sum, float scale, T* out, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    store_n(out + j, load(sum + j) * set1(scale), dim - j < kLanes ? int(dim - j) : kLanes);
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
