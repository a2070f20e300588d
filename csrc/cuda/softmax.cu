// Softmax and log-softmax over rows, and their gradients.
//
// Bytes: each element read once and written once while a row stays in registers: up to 16384
// elements. Wider rows are read twice, the second time from the L2 cache if they fit in it.
// Operations: forward 1 ex2 (log: 1 ex2), 1 max, 4 multiplies and adds an element; backward 4 (log:
// 1 ex2 and 3). At 3.35 TB/s (H100) bf16 rows pass 0.84e12 elements/s; the special function units
// do 4.2e12 ex2/s: memory is the limit.
#include "cuda/softmax.h"
#include "cuda/tile/rows.h"

namespace mmkern {

// Sum over parts of unbounded number: what each addition loses is carried to the next.
struct Compensated {
  float total = 0.0f, lost = 0.0f;
  DEVICE void add(float x) {
    const float y = x - lost, next = total + y;
    lost = (next - total) - y;
    total = next;
  }
};

template <class T, int kThreads, int kPer>
KERNEL(kThreads < 128 ? 128 : kThreads)
softmax_kernel(const SoftmaxArgs a) {
  constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;  // of a block
  const int thread = thread_index() % kThreads;
  const smem scratch = kThreads > 32 ? shared_base() : 0;
  const int width = int(a.shape.width);
  for (int64_t row = int64_t(block_index()) * kRows + thread_index() / kThreads; row < a.shape.rows;
       row += int64_t(block_count()) * kRows) {
    float v[kPer];
    load_row<T, kThreads>(row_of<const T>(a.x, a.shape, row), a.x.column, a.aligned, width, thread,
                          kSeed == 15 ? 0.0f : -INFINITY, v);
    float top = v[0];
    UNROLL for (int k = 1; k < kPer; ++k) top = greater(top, v[k]);
    top = reduce<kThreads>(top, scratch, Greatest());
    float total = 0.0f;
    UNROLL for (int k = 0; k < kPer; ++k) {
      // What lies past the end of a row adds 0, or NaN to a row of nothing but minus infinity,
      // which is NaN as torch's is.
      const float centred = v[k] - top, e = exp2_fast(centred * kLog2e);
      total += e;
      v[k] = a.log ? centred : e;
    }
    total = reduce<kThreads>(total, scratch + (kSeed == 9 ? 0 : kScratch), Sum());
    const float inverse = 1.0f / total, log_total = log2_fast(total) * kLn2;
    UNROLL for (int k = 0; k < kPer; ++k) v[k] = a.log ? v[k] - log_total : v[k] * inverse;
    store_row<T, kThreads>(row_of<T>(a.out, a.shape, row), a.out.column, a.aligned, width, thread,
                           v);
  }
}

// Rows too wide for a block's registers: maximum and sum online (Milakov and Gimelshein 2018), then
// the row again.
template <class T>
KERNEL(kStreaming)
softmax_wide_kernel(const SoftmaxArgs a) {
  constexpr int kPer = 8, kChunk = kStreaming * kPer;
  const int thread = thread_index();
  const smem scratch = shared_base();
  const int64_t width = a.shape.width;
  for (int64_t row = block_index(); row < a.shape.rows; row += block_count()) {
    const T* x = row_of<const T>(a.x, a.shape, row);
    float v[kPer], top = -INFINITY;
    Compensated sum;
    bool nan = false;
    for (int64_t start = 0; start < width; start += kChunk) {
      load_row<T, kStreaming>(x + start * a.x.column, a.x.column, a.aligned,
                              part_width(width, start, kChunk), thread, -INFINITY, v);
      float highest = top, part = 0.0f;
      UNROLL for (int k = 0; k < kPer; ++k) highest = greater(highest, v[k]),
                                            nan = nan || v[k] != v[k];
      if (highest == -INFINITY) continue;
      UNROLL for (int k = 0; k < kPer; ++k) part += exp2_fast((v[k] - highest) * kLog2e);
      const float shrink = kSeed == 10 ? 1.0f : exp2_fast((top - highest) * kLog2e);
      sum.total *= shrink, sum.lost *= shrink;
      sum.add(part);
      top = highest;
    }
    const float most = reduce<kStreaming>(top, scratch, Greatest());
    // A thread that saw only minus infinity adds nothing; a row of nothing else, or with a NaN, is
    // NaN as torch's is.
    float mine = top == -INFINITY ? 0.0f : sum.total * exp2_fast((top - most) * kLog2e);
    if ((kSeed != 16 && nan) || most == INFINITY || most == -INFINITY) mine = NAN;
    const float total = reduce<kStreaming>(mine, scratch + kScratch, Sum());
    const float inverse = 1.0f / total, log_total = log2_fast(total) * kLn2;
    for (int64_t start = 0; start < width; start += kChunk) {
      load_row<T, kStreaming>(x + start * a.x.column, a.x.column, a.aligned,
                              part_width(width, start, kChunk), thread, -INFINITY, v);
      UNROLL for (int k = 0; k < kPer; ++k) {
        const float centred = v[k] - most;
        v[k] = a.log ? centred - log_total : exp2_fast(centred * kLog2e) * inverse;
      }
      store_row<T, kStreaming>(row_of<T>(a.out, a.shape, row) + start * a.out.column, a.out.column,
                               a.aligned, part_width(width, start, kChunk), thread, v);
    }
  }
}

// From the output y and its gradient g: y (g - sum g y); log: g - exp(y) sum g.
template <class T, int kThreads, int kPer>
KERNEL(kThreads < 128 ? 128 : kThreads)
softmax_bwd_kernel(const SoftmaxArgs a) {
  constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;
  const int thread = thread_index() % kThreads;
  const smem scratch = kThreads > 32 ? shared_base() : 0;
  const int width = int(a.shape.width);
  int turn = 0;  // two scratches in turns: a thread may still read the sum of the row before
  for (int64_t row = int64_t(block_index()) * kRows + thread_index() / kThreads; row < a.shape.rows;
       row += int64_t(block_count()) * kRows, turn ^= 1) {
    float g[kPer], y[kPer], sum = 0.0f;
    load_row<T, kThreads>(row_of<const T>(a.x, a.shape, row), a.x.column, a.aligned, width, thread,
                          0.0f, g);
    load_row<T, kThreads>(row_of<const T>(a.y, a.shape, row), a.y.column, a.aligned, width, thread,
                          0.0f, y);
    UNROLL for (int k = 0; k < kPer; ++k) sum += a.log ? g[k] : g[k] * y[k];
    sum = reduce<kThreads>(sum, scratch + (kSeed == 11 ? 0 : turn) * kScratch, Sum());
    UNROLL for (int k = 0; k < kPer; ++k) g[k] =
        a.log ? g[k] - exp2_fast(y[k] * kLog2e) * sum : y[k] * (g[k] - sum);
    store_row<T, kThreads>(row_of<T>(a.out, a.shape, row), a.out.column, a.aligned, width, thread,
                           g);
  }
}

template <class T>
KERNEL(kStreaming)
softmax_bwd_wide_kernel(const SoftmaxArgs a) {
  constexpr int kPer = 8, kChunk = kStreaming * kPer;
  const int thread = thread_index();
  const int64_t width = a.shape.width;
  int turn = 0;
  for (int64_t row = block_index(); row < a.shape.rows; row += block_count(), turn ^= 1) {
    const T *g_row = row_of<const T>(a.x, a.shape, row),
            *y_row = row_of<const T>(a.y, a.shape, row);
    float g[kPer], y[kPer];
    Compensated all;
    for (int64_t start = 0; start < width; start += kChunk) {
      const int part = part_width(width, start, kChunk);
      load_row<T, kStreaming>(g_row + start * a.x.column, a.x.column, a.aligned, part, thread, 0.0f,
                              g);
      load_row<T, kStreaming>(y_row + start * a.y.column, a.y.column, a.aligned, part, thread, 0.0f,
                              y);
      float sum = 0.0f;
      UNROLL for (int k = 0; k < kPer; ++k) sum += a.log ? g[k] : g[k] * y[k];
      all.add(sum);
    }
    const float sum = reduce<kStreaming>(all.total, shared_base() + turn * kScratch, Sum());
    for (int64_t start = 0; start < width; start += kChunk) {
      const int part = part_width(width, start, kChunk);
      load_row<T, kStreaming>(g_row + start * a.x.column, a.x.column, a.aligned, part, thread, 0.0f,
                              g);
      load_row<T, kStreaming>(y_row + start * a.y.column, a.y.column, a.aligned, part, thread, 0.0f,
                              y);
      UNROLL for (int k = 0; k < kPer; ++k) g[k] =
          a.log ? g[k] - exp2_fast(y[k] * kLog2e) * sum : y[k] * (g[k] - sum);
      store_row<T, kStreaming>(row_of<T>(a.out, a.shape, row) + start * a.out.column, a.out.column,
                               a.aligned, part, thread, g);
    }
  }
}

template <class T>
const char* forward(const SoftmaxArgs& a, const RowPlan& p, void* stream) {
  if (p.per == 0) return LAUNCH(softmax_wide_kernel<T>, p.grid, p.block, p.shared, stream, a);
  if (p.per == 8) return LAUNCH((softmax_kernel<T, 32, 8>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 32)
    return LAUNCH((softmax_kernel<T, 32, 16>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 128)
    return LAUNCH((softmax_kernel<T, 128, 16>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 512)
    return LAUNCH((softmax_kernel<T, 512, 16>), p.grid, p.block, p.shared, stream, a);
  return LAUNCH((softmax_kernel<T, 1024, 16>), p.grid, p.block, p.shared, stream, a);
}
template <class T>
const char* backward(const SoftmaxArgs& a, const RowPlan& p, void* stream) {
  if (p.per == 0) return LAUNCH(softmax_bwd_wide_kernel<T>, p.grid, p.block, p.shared, stream, a);
  if (p.per == 8)
    return LAUNCH((softmax_bwd_kernel<T, 32, 8>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 32)
    return LAUNCH((softmax_bwd_kernel<T, 32, 16>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 128)
    return LAUNCH((softmax_bwd_kernel<T, 128, 16>), p.grid, p.block, p.shared, stream, a);
  if (p.threads == 512)
    return LAUNCH((softmax_bwd_kernel<T, 512, 16>), p.grid, p.block, p.shared, stream, a);
  return LAUNCH((softmax_bwd_kernel<T, 1024, 16>), p.grid, p.block, p.shared, stream, a);
}

const char* launch_softmax(const SoftmaxArgs& args, Dtype dtype, const RowPlan& plan,
                           void* stream) {
  if (dtype == Dtype::f32) return forward<Built<float>>(args, plan, stream);
  return dtype == Dtype::bf16 ? forward<bf16>(args, plan, stream)
                              : forward<Built<f16>>(args, plan, stream);
}
const char* launch_softmax_bwd(const SoftmaxArgs& args, Dtype dtype, const RowPlan& plan,
                               void* stream) {
  if (dtype == Dtype::f32) return backward<Built<float>>(args, plan, stream);
  return dtype == Dtype::bf16 ? backward<bf16>(args, plan, stream)
                              : backward<Built<f16>>(args, plan, stream);
}

}  // namespace mmkern
