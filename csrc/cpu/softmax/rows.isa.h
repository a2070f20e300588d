// Rows of softmax: where they lie, their maximum, exponentials and results.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/row_steps.isa.h"
#include "cpu/simd/stream.isa.h"
#include "cpu/simd/vec.isa.h"
#include "cpu/softmax/args.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kTaskElements = 16384;  // per task: 10 microseconds or more
constexpr int64_t kCachedCols = 65536;    // longest row whose float32 copy (256 KB) is kept
constexpr int64_t kChunk = 4096;          // of a longer row, in L1 from one pass to the next
constexpr int64_t kSharedRows = 4;        // so few long rows are cut up between threads
constexpr int64_t kWidth = 4 * kLanes;    // rows side by side (64 on AVX-512: 256 bytes of float32)
constexpr int64_t kSumVecs = 64;  // summed apart: rounding grows with 64 terms, not with the row

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int lanes_left(int64_t n) { return n < kLanes ? int(n) : kLanes; }

template <class T>
inline void store_part(T* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// Calls f(j, n) for each vector of a row of cols elements.
template <class F>
inline void each_vec(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes);
  if (j < cols) f(j, int(cols - j));
}
// Calls f(v, first lane, lanes) for each vector of n rows side by side.
template <class F>
inline void each_lane_vec(int64_t n, const F& f) {
  if (n == kWidth) {
    for (int v = 0; v < 4; ++v) f(v, v * kLanes, kLanes);
  } else {
    for (int v = 0; v * kLanes < n; ++v) f(v, v * kLanes, lanes_left(n - v * kLanes));
  }
}

// Where a row of each operand starts; steps through the outer dims in order.
class Cursor {
  const SoftmaxArgs& a_;
  int64_t index_[64];

 public:
  int64_t x = 0, mask = 0, bias = 0, out = 0, grad = 0, term = 0;

  Cursor(const SoftmaxArgs& a, int64_t row) : a_(a) {
    for (int d = a.outer_dims - 1; d >= 0; --d) {
      index_[d] = row % a.outer_sizes[d];
      row /= a.outer_sizes[d];
      move(d, index_[d]);
    }
  }
  void next() {
    for (int d = a_.outer_dims - 1; d >= 0; --d) {
      move(d, 1);
      if (++index_[d] < a_.outer_sizes[d]) return;
      move(d, -index_[d]);
      index_[d] = 0;
    }
  }
  // That many rows to the side, of those that are worked on side by side.
  void to_side(int64_t lanes) {
    x += lanes, out += lanes, grad += lanes;
    mask += lanes * a_.mask.inner, bias += lanes * a_.bias.inner;
  }

 private:
  void move(int d, int64_t steps) {
    x += steps * a_.x.outer[d];
    out += steps * a_.out.outer[d];
    if (a_.mask.outer) mask += steps * a_.mask.outer[d];
    if (a_.bias.outer) bias += steps * a_.bias.outer[d];
    if (a_.grad.outer) grad += steps * a_.grad.outer[d];
    if (a_.term.outer) term += steps * a_.term.outer[d];
  }
};

inline int64_t row_count(const SoftmaxArgs& a) {
  int64_t rows = 1;
  for (int d = 0; d < a.outer_dims; ++d) rows *= a.outer_sizes[d];
  return rows;
}

// e = exp(x - shift), n of each, as exact as T; returns the sum. e may be x, or null. Meanwhile
// asks for `next`, n elements that will be read soon.
template <class T, bool kKeep, class S>
double write_exp(const S* x, float shift, float* e, const T* next, int64_t n) {
  double total = 0.0;
  for (int64_t j = 0;;) {
    Vec near = zero();  // not a LongSum, whose lanes in memory cost a row of 128 elements a third
    for (int64_t parts = 0; parts < kNear && j + kLanes <= n; ++parts) {
      Vec part = zero();
      const int64_t end = smaller(n - kLanes, j + (kSumVecs - 1) * kLanes);
      for (; j <= end; j += kLanes) {
        if (next) __builtin_prefetch(next + j);
        const Vec v = exp_to<T>(load(x + j) - set1(shift));
        if (kKeep) store(e + j, v);
        part = part + v;
      }
      near = near + part;
    }
    if (j + kLanes <= n) {
      total += reduce_add(near);
      continue;
    }
    if (const int left = int(n - j)) {
      const Vec v = exp_to<T>(load_n(x + j, left) - set1(shift));
      if (kKeep) store_n(e + j, v, left);
      near = near + select(first_n(left), v, zero());
    }
    return total + reduce_add(near);
  }
}

// out[j] = result(j, n), past the caches where the output would not stay there. What a result is
// made from is to be captured by value: read by reference it would be read again after each store.
template <class T, class F>
void write_row(T* out, int64_t cols, bool streams, F result) {
  int64_t j = 0;
  if (streams) {
    while (j < cols && j < kLanes && !stream_aligned(out + j)) ++j;
    if (j > 0 && j < kLanes) store_n(out, result(0, int(j)), int(j));
    if (j < kLanes) {
      for (; j + kLanes <= cols; j += kLanes) stream(out + j, result(j, kLanes));
    } else {
      j = 0;  // an odd address: never a whole aligned vector
    }
  }
  for (; j + kLanes <= cols; j += kLanes) store(out + j, result(j, kLanes));
  if (j < cols) store_n(out + j, result(j, int(cols - j)), int(cols - j));
}

// The same for an output of any stride.
template <class T, class F>
void write_row(T* out, int64_t stride, int64_t cols, bool streams, F result) {
  if (stride == 1) return write_row(out, cols, streams, result);
  for (int64_t j = 0; j < cols; j += kLanes) {
    float lanes[kLanes];
    const int n = lanes_left(cols - j);
    store(lanes, result(j, n));
    for (int i = 0; i < n; ++i) from_float(lanes[i], out + (j + i) * stride);
  }
}

// Calls f(c, j, n) for each chunk of a long row, columns [j, j + n), by all threads where it is
// shared between them. streams: f writes past the caches.
template <class F>
void each_chunk(int64_t cols, bool shared, bool streams, const F& f) {
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  const int64_t share = shared ? kTaskElements / kChunk : chunks;
  const auto task = [&](int64_t task) {
    for (int64_t c = task * share; c < smaller(chunks, (task + 1) * share); ++c) {
      f(c, c * kChunk, smaller(kChunk, cols - c * kChunk));
    }
    if (streams) stream_fence();
  };
  if (shared) return parallel_tasks((chunks + share - 1) / share, task);
  task(0);
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
