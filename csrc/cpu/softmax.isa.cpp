// Softmax over contiguous rows.
#include "cpu/softmax.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

template <class T>
void softmax_row(const T* x, T* out, int64_t cols) {
  Vec top = set1(-kInf);
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int n = cols - j < kLanes ? int(cols - j) : kLanes;
    top = max(top, select(first_n(n), load_n(x + j, n), set1(-kInf)));
  }
  const Vec m = set1(reduce_max(top) * kLog2e);
  Vec sum = zero();
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int n = cols - j < kLanes ? int(cols - j) : kLanes;
    sum = sum + select(first_n(n), exp2(fma(load_n(x + j, n), set1(kLog2e), zero() - m)), zero());
  }
  const Vec scale = set1(1.0f / reduce_add(sum));
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int n = cols - j < kLanes ? int(cols - j) : kLanes;
    store_n(out + j, exp2(fma(load_n(x + j, n), set1(kLog2e), zero() - m)) * scale, n);
  }
}

}  // namespace

void softmax_rows(const SoftmaxArgs& a) {
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    parallel_tasks(a.rows, [&](int64_t row) {
      softmax_row(static_cast<const T*>(a.x) + row * a.cols, static_cast<T*>(a.out) + row * a.cols,
                  a.cols);
    });
  })
}

}  // namespace mmkern::MMKERN_ISA
