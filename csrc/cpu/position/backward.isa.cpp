// Gradients of tables that rows were looked up in: of positions, and of tokens. Each row of the
// gradient is read once, each row of a table written once; rows are added in order, so that they do
// not depend on who adds them.
#include "cpu/position/backward.h"

#include "cpu/parallel.h"
#include "cpu/position/rows.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kTaskElements = 24576;  // worth handing to another thread: 8 us

template <class T>
const T* row_at(const Rows& grad, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(grad.data) + b * grad.stride_b + h * grad.stride_h +
         t * grad.stride_l;
}

template <class T>
void sum_position(const PositionSums& a, const Dropout& d, int64_t position, float* scratch,
                  float* factors) {
  RowSum sum(scratch, a.grad.dim);
  for (int64_t b = 0; b < a.grad.batch; ++b) {
    const uint64_t t = uint64_t(position) - uint64_t(a.offsets ? a.offsets[b] : a.offset);
    if (t >= uint64_t(a.grad.length)) continue;
    for (int64_t h = 0; h < a.grad.heads; ++h) {
      const int64_t row = (b * a.grad.heads + h) * a.grad.length + t;
      if (d.on()) keep_row(d, a.keep, row, a.grad.length, a.grad.dim, factors);
      sum.add(row_at<T>(a.grad, b, h, t), d.on() ? factors : nullptr);
    }
  }
  write_sum(sum.value(), 1.0f, static_cast<T*>(a.out) + position * a.grad.dim, a.grad.dim);
}

template <class T>
void sum_token(const TokenSums& a, const Dropout& d, int64_t id, float* scratch, float* factors) {
  T* out = static_cast<T*>(a.out) + id * a.grad.dim;
  const int64_t first = a.starts[id], end = a.starts[id + 1];
  if (first == end) {
    memset(static_cast<void*>(out), 0, a.grad.dim * sizeof(T));
    return;
  }
  RowSum sum(scratch, a.grad.dim);
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = a.order[i], lead = row / a.grad.length;
    if (i + 1 < end) {  // the next one may lie anywhere
      const int64_t next = a.order[i + 1], at = next / a.grad.length;
      const T* p = row_at<T>(a.grad, at / a.grad.heads, at % a.grad.heads, next % a.grad.length);
      for (int64_t j = 0; j < a.grad.dim; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + j);
    }
    if (d.on()) keep_row(d, a.keep, row, a.grad.length, a.grad.dim, factors);
    sum.add(row_at<T>(a.grad, lead / a.grad.heads, lead % a.grad.heads, row % a.grad.length),
            d.on() ? factors : nullptr);
  }
  write_sum(sum.value(), a.scale, out, a.grad.dim);
}

// Calls f(i, sum, factors) for i in [0, count), some of `elements` of work in all.
template <class F>
void each(int64_t count, int64_t elements, int64_t dim, const F& f) {
  int64_t tasks = elements / kTaskElements;
  tasks = tasks < 1 ? 1 : tasks > count ? count : tasks;
  parallel_tasks(tasks, [&](int64_t task) {
    const int64_t room = RowSum::room(dim);
    float* sum = static_cast<float*>(thread_scratch((room + factor_room(dim)) * sizeof(float)));
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      f(i, sum, sum + room);
    }
  });
}

}  // namespace

void sum_positions(const PositionSums& a) {
  const Dropout d(a.keep.dropout_p, a.keep.seed);
  const int64_t rows = a.grad.batch * a.grad.heads * a.grad.length + a.positions;
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    each(a.positions, rows * a.grad.dim, a.grad.dim,
         [&](int64_t i, float* sum, float* factors) { sum_position<T>(a, d, i, sum, factors); });
  })
}

void sum_tokens(const TokenSums& a) {
  const Dropout d(a.keep.dropout_p, a.keep.seed);
  const int64_t rows = a.grad.batch * a.grad.heads * a.grad.length + a.vocabulary;
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    each(a.vocabulary, rows * a.grad.dim, a.grad.dim,
         [&](int64_t i, float* sum, float* factors) { sum_token<T>(a, d, i, sum, factors); });
  })
}

}  // namespace mmkern::MMKERN_ISA
