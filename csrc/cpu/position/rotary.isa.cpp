// Rotary embedding: one read and one write of each element of q and k. Sines and cosines of a block
// of positions are computed once, into L2, and used for all heads of the batch.
#include "cpu/position/rotary.h"

#include "cpu/parallel.h"
#include "cpu/position/sincos.isa.h"
#include "cpu/simd/stream.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Elements that are worth handing to another thread: waking it takes 5 us, these 10 us.
constexpr int64_t kTaskElements = 32768;
// Sines and cosines of one block of positions: an eighth of a 1 MB L2. Long blocks give each head
// pieces of many pages; 16 KB costs 8x12x1024x64 a third of its speed.
constexpr int64_t kTableBytes = 131072;
// Rows of one task that share a block of positions, where there are as many.
constexpr int64_t kMinMembers = 16;

// Channels [0, 2 * pairs) of one row; `cosines` and `sines` have one entry per pair.
template <bool kStream, class T>
void rotate_halves(const T* x, T* out, const float* cosines, const float* sines, int64_t pairs) {
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Vec c = load(cosines + i), s = load(sines + i), a = load(x + i), b = load(x + pairs + i);
    put<kStream>(out + i, fnma(b, s, a * c));
    put<kStream>(out + pairs + i, fma(b, c, a * s));
  }
  if (const int n = int(pairs - i); n > 0) {
    const Vec c = load(cosines + i), s = load(sines + i);
    const Vec a = load_n(x + i, n), b = load_n(x + pairs + i, n);
    store_n(out + i, fnma(b, s, a * c), n);
    store_n(out + pairs + i, fma(b, c, a * s), n);
  }
}

// The same for adjacent pairs; here the tables have one entry per channel, sines as -s, s.
template <bool kStream, class T>
void rotate_adjacent(const T* x, T* out, const float* cosines, const float* sines, int64_t pairs) {
  int64_t i = 0;
  for (; i + kLanes <= 2 * pairs; i += kLanes) {
    const Vec v = load(x + i);
    put<kStream>(out + i, fma(v, load(cosines + i), swap_pairs(v) * load(sines + i)));
  }
  if (const int n = int(2 * pairs - i); n > 0) {
    const Vec v = load_n(x + i, n);
    store_n(out + i, fma(v, load(cosines + i), swap_pairs(v) * load(sines + i)), n);
  }
}

template <class T>
class Work {
 public:
  explicit Work(const RotaryArgs& args)
      : a(args),
        // One entry per pair or channel, and what a last vector writes past it.
        stride((a.interleaved ? 2 : 1) * a.pairs + 2 * kLanes),
        streaming((a.q.batch * a.q.heads + a.k.batch * a.k.heads) * a.q.length * a.q.dim *
                      int64_t(sizeof(T)) >=
                  kStreamBytes) {}

  int64_t block_length() const {
    const int64_t fit = kTableBytes / int64_t(sizeof(float) * 2 * stride);
    return fit < 1 ? 1 : fit < a.q.length ? fit : a.q.length;
  }

  // Rows [t0, t1) of `run`, which is all of the batch, or one entry where each has its own
  // positions; part `group` of `groups` of them.
  void rotate_run(int64_t run, int64_t t0, int64_t t1, int64_t group, int64_t groups) const {
    const int64_t n = t1 - t0;
    float* cosines = static_cast<float*>(thread_scratch(sizeof(float) * 2 * n * stride));
    float* sines = cosines + n * stride;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t p = a.positions ? a.positions[run * a.positions_stride_b + t0 + t] : t0 + t;
      fill(p, cosines + t * stride, sines + t * stride);
    }
    apply(a.q, a.q_out, run, t0, n, group, groups, cosines, sines);
    if (a.k.data) apply(a.k, a.k_out, run, t0, n, group, groups, cosines, sines);
    if (streaming) stream_fence();
  }

 private:
  void fill(int64_t position, float* cosines, float* sines) const {
    if (a.grid_width) {
      int64_t row = position / a.grid_width, column = position % a.grid_width;
      if (column < 0) --row, column += a.grid_width;
      const int64_t half = a.pairs / 2;
      sincos_row(a.turns, half, uint64_t(row), sines, cosines);
      sincos_row(a.turns, half, uint64_t(column), sines + half, cosines + half);
    } else {
      sincos_row(a.turns, a.pairs, uint64_t(position), sines, cosines);
    }
    for (int64_t i = 0; a.inverse && i < a.pairs; i += kLanes) {
      store(sines + i, zero() - load(sines + i));
    }
    if (!a.interleaved) return;
    for (int64_t i = (a.pairs - 1) / kLanes * kLanes; i >= 0;
         i -= kLanes) {  // in place, from the end
      Vec c = load(cosines + i), c2 = c, s = load(sines + i), minus = zero() - s;
      interleave(c, c2);
      interleave(minus, s);
      store(cosines + 2 * i, c);
      store(cosines + 2 * i + kLanes, c2);
      store(sines + 2 * i, minus);
      store(sines + 2 * i + kLanes, s);
    }
  }

  void apply(const Rows& in, const Rows& to, int64_t run, int64_t t0, int64_t n, int64_t group,
             int64_t groups, const float* cosines, const float* sines) const {
    const int64_t members = (a.positions_stride_b ? 1 : in.batch) * in.heads;
    const int64_t m0 = members * group / groups, m1 = members * (group + 1) / groups;
    // In (batch, length, heads, dim) memory, a position's heads lie together: heads innermost.
    const bool heads_inner = to.stride_h < to.stride_l && m1 - m0 == members;
    for (int64_t m = m0; m < m1; m += heads_inner ? in.heads : 1) {
      const int64_t b = run + m / in.heads, h = m % in.heads;
      const T* x = static_cast<const T*>(in.data) + b * in.stride_b + h * in.stride_h;
      T* out = static_cast<T*>(to.data) + b * to.stride_b + h * to.stride_h;
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t head = 0; head < (heads_inner ? in.heads : 1); ++head) {
          row(x + (t0 + t) * in.stride_l + head * in.stride_h,
              out + (t0 + t) * to.stride_l + head * to.stride_h, cosines + t * stride,
              sines + t * stride, in.dim);
        }
      }
    }
  }

  void row(const T* x, T* out, const float* cosines, const float* sines, int64_t dim) const {
    const bool stream = streaming && stream_aligned(out) && stream_aligned(out + a.pairs);
    if (a.interleaved) {
      stream ? rotate_adjacent<true>(x, out, cosines, sines, a.pairs)
             : rotate_adjacent<false>(x, out, cosines, sines, a.pairs);
    } else {
      stream ? rotate_halves<true>(x, out, cosines, sines, a.pairs)
             : rotate_halves<false>(x, out, cosines, sines, a.pairs);
    }
    if (const int64_t rest = dim - 2 * a.pairs) {
      memcpy(out + 2 * a.pairs, x + 2 * a.pairs, sizeof(T) * rest);
    }
  }

  const RotaryArgs& a;
  const int64_t stride;
  const bool streaming;
};

}  // namespace

void rotate(const RotaryArgs& a) {
  const int64_t runs = a.positions_stride_b ? a.q.batch : 1;
  const int64_t rows = a.q.batch * a.q.heads + a.k.batch * a.k.heads, members = rows / runs;
  const int64_t work = rows * a.q.length * a.q.dim;
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    const Work<T> w(a);
    const int64_t length = w.block_length(), blocks = (a.q.length + length - 1) / length;
    int64_t tasks = work / kTaskElements < 1 ? 1 : work / kTaskElements, groups = 1;
    if (const int64_t wanted = num_threads() * 4 < tasks ? num_threads() * 4 : tasks;
        runs * blocks < wanted) {
      const int64_t most = (members + kMinMembers - 1) / kMinMembers;
      groups = (wanted + runs * blocks - 1) / (runs * blocks);
      if (groups > most) groups = most;
    }
    const int64_t items = runs * blocks * groups;
    if (tasks > items) tasks = items;
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
        const int64_t group = i % groups, t0 = i / groups % blocks * length;
        const int64_t t1 = t0 + length < a.q.length ? t0 + length : a.q.length;
        w.rotate_run(i / groups / blocks, t0, t1, group, groups);
      }
    });
  })
}

}  // namespace mmkern::MMKERN_ISA
