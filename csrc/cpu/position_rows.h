// What the position kernels do with one row. For *.isa.cpp files.
#pragma once

#include "cpu/philox.h"
#include "cpu/position.h"
#include "cpu/vec.h"

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

template <class T>
void write_sum(const float* sum, float scale, T* out, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    store_n(out + j, load(sum + j) * set1(scale), dim - j < kLanes ? int(dim - j) : kLanes);
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
