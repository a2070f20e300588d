// Positional encodings: one read and one write of each element. A block of kSteps encoded positions
// is computed once, into L1 or L2, and added to every row of the batch that has these positions.
#include "cpu/position/forward.h"

#include "cpu/parallel.h"
#include "cpu/position/rows.isa.h"
#include "cpu/position/sincos.isa.h"
#include "cpu/simd/stream.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Elements that are worth handing to another thread: waking it takes 5 us, these 8 us.
constexpr int64_t kTaskElements = 24576;
// Encoded rows that are computed at a time, in L2, where several members use them: a member's rows
// then are 48 pages in a row to the prefetchers. Where there is one member, kSteps rows, in L1.
constexpr int64_t kRowBytes = 196608;
constexpr int64_t kMaxRows = 64;
// Rows of one task that share a block of positions: keeps computing the block below 5% of the work.
constexpr int64_t kMinMembers = 8;

// out = scale * x + row. Each element: one read of x, one write; the row comes from L1 or L2.
template <bool kAdd, bool kStream, class T, class R>
void add_row(const T* x, const R* row, T* out, int64_t dim, Vec scale) {
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    put<kStream>(out + j, kAdd ? fma(load(x + j), scale, load(row + j)) : load(x + j) * scale);
  }
  if (const int n = int(dim - j); n > 0) {
    const Vec v = load_n(x + j, n);
    store_n(out + j, kAdd ? fma(v, scale, load_n(row + j, n)) : v * scale, n);
  }
}

// The same, dropped out; row null: nothing to add.
template <class T, class R>
void add_row_dropped(const T* x, const R* row, const float* factors, T* out, int64_t dim,
                     Vec scale) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    const int n = dim - j < kLanes ? int(dim - j) : kLanes;
    const Vec v = load_n(x + j, n) * scale;
    store_n(out + j, (row ? v + load_n(row + j, n) : v) * load(factors + j), n);
  }
}

// Sine and cosine of (position + step) from those of both: s*ct + c*st, c*ct - s*st.
inline void add_angles(const float* base, const float* step, int64_t i, int64_t pad, Vec* s,
                       Vec* c) {
  const Vec s0 = load(base + i), c0 = load(base + pad + i);
  const Vec s1 = load(step + i), c1 = load(step + pad + i);
  *s = fma(s0, c1, c0 * s1);
  *c = fnma(s0, s1, c0 * c1);
}

// One encoded row of `dim` (rounded up to 2 * kLanes) from the row of its block and that of its
// step.
void encode(const PositionArgs& a, const float* base, const float* step, float* row) {
  const int64_t pad = padded(a.pairs), dim = a.out.dim;
  Vec s, c;
  switch (a.encoding) {
    case Encoding::sinusoidal:
      for (int64_t i = 0; i < a.pairs; i += kLanes) {
        add_angles(base, step, i, pad, &s, &c);
        interleave(s, c);
        store(row + 2 * i, s);
        store(row + 2 * i + kLanes, c);
      }
      return;
    case Encoding::scalar:
      add_angles(base, step, 0, pad, &s, &c);
      store(row, s + c);
      s = set1(row[0]);
      for (int64_t j = 0; j < dim; j += kLanes) store(row + j, s);
      return;
    case Encoding::sincos2d:  // column: sines, cosines; row: sines, cosines; dim / 4 each
      for (int64_t half = 0, n = dim / 4; half < 2; ++half) {
        for (int64_t i = 0; i < n; i += kLanes) {
          const int valid = n - i < kLanes ? int(n - i) : kLanes;
          add_angles(base, step, half * n + i, pad, &s, &c);
          store_n(row + 2 * half * n + i, s, valid);
          store_n(row + (2 * half + 1) * n + i, c, valid);
        }
      }
      return;
    default: return;
  }
}

// Sines then cosines of all pairs at a position; in a grid, `position` is the column.
void sincos_pairs(const PositionArgs& a, int64_t grid_row, uint64_t position, float* to) {
  const int64_t pad = padded(a.pairs);
  if (a.encoding == Encoding::sincos2d) {  // the second half of the pairs turns with the grid's row
    const int64_t n = a.pairs / 2;
    sincos_row(a.turns, n, position, to, to + pad);
    sincos_row(a.turns, n, uint64_t(grid_row), to + n, to + pad + n);
  } else {
    sincos_row(a.turns, a.pairs, position, to, to + pad);
  }
}

// Rows with the same positions are members of one run: all of the batch, the heads of one batch
// entry (offsets), or one grid row over the batch (sincos2d).
struct Runs {
  int64_t runs, members;
  explicit Runs(const PositionArgs& a)
      : runs(a.offsets                          ? a.out.batch
             : a.encoding == Encoding::sincos2d ? a.out.heads
                                                : 1),
        members(a.out.batch * a.out.heads / runs) {}
};

template <class T>
class Work {
 public:
  Work(const PositionArgs& args, const Runs& runs)
      : a(args),
        scale(set1(args.scale)),
        stride(2 * padded((args.out.dim + 1) / 2)),
        streaming(runs.runs * runs.members * args.out.length * args.out.dim * int64_t(sizeof(T)) >=
                  kStreamBytes) {
    const int64_t fit = kRowBytes / int64_t(sizeof(float) * stride) / kSteps * kSteps;
    chunk = runs.members == 1 || fit < kSteps ? kSteps : fit < kMaxRows ? fit : kMaxRows;
  }

  // Chunks begin at multiples of kSteps; a run has at most this many, for any offset.
  int64_t chunks() const { return (a.out.length + kSteps - 2 + chunk) / chunk; }

  // Rows of members [m0, m1) of `run` at chunk `index` of its positions.
  void run_chunk(int64_t run, int64_t index, int64_t m0, int64_t m1) const {
    // Rows [t0, t1) of the run. Positions wrap as int64 does, for whatever offset.
    const int64_t start = a.offsets ? a.offsets[run] : a.offset;
    const int64_t first = index * chunk - (start & (kSteps - 1));
    const int64_t t0 = first < 0 ? 0 : first;
    const int64_t t1 = first + chunk < a.out.length ? first + chunk : a.out.length;
    if (t0 >= t1) return;
    const int64_t n = t1 - t0;
    const bool computed = a.encoding != Encoding::none && a.encoding != Encoding::table;
    const int64_t pad = padded(a.pairs), room = dropout.on() ? factor_room(a.out.dim) : 0;
    const int64_t floats = room + (computed ? 2 * pad + chunk * stride : 0);
    float* const factors =
        floats ? static_cast<float*>(thread_scratch(sizeof(float) * floats)) : nullptr;
    if (a.encoding == Encoding::none) {
      members<false>(run, m0, m1, t0, n, static_cast<const T*>(nullptr), 0, factors);
    } else if (a.encoding == Encoding::table) {
      const T* table = static_cast<const T*>(a.table) + (start + t0) * a.table_stride;
      members<true>(run, m0, m1, t0, n, table, a.table_stride, factors);
    } else {
      float *base = factors + room, *rows = base + 2 * pad;
      for (int64_t t = t0; t < t1; ++t) {
        const uint64_t p = uint64_t(start) + uint64_t(t), step = p & (kSteps - 1);
        if (step == 0 || t == t0) sincos_pairs(a, run, p - step, base);
        encode(a, base, a.steps + step * 2 * pad, rows + (t - t0) * stride);
      }
      members<true>(run, m0, m1, t0, n, rows, stride, factors);
    }
    if (streaming) stream_fence();
  }

 private:
  // Positions [t0, t0 + n) of the run for each of its members, given their encoded rows.
  template <bool kAdd, class R>
  void members(int64_t run, int64_t m0, int64_t m1, int64_t t0, int64_t n, const R* rows,
               int64_t row_stride, float* factors) const {
    const bool grid = a.encoding == Encoding::sincos2d;
    for (int64_t m = m0; m < m1; ++m) {
      const int64_t b = a.offsets ? run : grid ? m : m / a.out.heads;
      const int64_t h = a.offsets ? m : grid ? run : m % a.out.heads;
      T* out = static_cast<T*>(a.out.data) + b * a.out.stride_b + h * a.out.stride_h;
      const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + h * a.x.stride_h;
      const int64_t token = (b * a.out.heads + h) * a.out.length;
      for (int64_t t = t0; t < t0 + n; ++t) {
        const T* from = a.x.data ? x + t * a.x.stride_l : embedding(token + t);
        const R* row = rows + (t - t0) * row_stride;
        T* to = out + t * a.out.stride_l;
        if (dropout.on()) {
          keep_row(dropout, a.keep, token + t, a.out.length, a.out.dim, factors);
          add_row_dropped(from, kAdd ? row : nullptr, factors, to, a.out.dim, scale);
        } else if (streaming && stream_aligned(to)) {
          add_row<kAdd, true>(from, row, to, a.out.dim, scale);
        } else {
          add_row<kAdd, false>(from, row, to, a.out.dim, scale);
        }
      }
    }
  }

  const T* embedding(int64_t i) const {
    const int64_t id = a.tokens.wide ? static_cast<const int64_t*>(a.tokens.ids)[i]
                                     : static_cast<const int32_t*>(a.tokens.ids)[i];
    // Checked before, and again where it is used: another thread may have changed it.
    const bool known = uint64_t(id) < uint64_t(a.vocabulary);
    return static_cast<const T*>(a.weight) + (known ? id : 0) * a.weight_stride;
  }

  const PositionArgs& a;
  const Vec scale;
  const Dropout dropout{a.keep.dropout_p, a.keep.seed};
  const int64_t stride;  // of encoded rows
  const bool streaming;
  int64_t chunk;  // positions
};

template <class I>
int64_t first_outside(const void* ids, int64_t count, uint64_t vocabulary) {
  const I* id = static_cast<const I*>(ids);
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= uint64_t(int64_t{id[i]}) >= vocabulary;
  if (!outside) return -1;
  int64_t i = 0;
  while (uint64_t(int64_t{id[i]}) < vocabulary) ++i;
  return i;
}

}  // namespace

void fill_steps(const PositionArgs& a) {
  for (int64_t step = 0; step < kSteps; ++step) {
    sincos_pairs(a, 0, step, a.steps + step * 2 * padded(a.pairs));
  }
}

void add_positions(const PositionArgs& a) {
  const Runs r(a);
  const int64_t work = r.runs * r.members * a.out.length * a.out.dim;
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    const Work<T> w(a, r);
    const int64_t chunks = w.chunks(), wanted = num_threads() * 4;
    int64_t groups = 1;  // parts of the members, where runs and chunks are too few
    if (r.runs * chunks < wanted && work > kTaskElements) {
      const int64_t most = (r.members + kMinMembers - 1) / kMinMembers;
      groups = (wanted + r.runs * chunks - 1) / (r.runs * chunks);
      if (groups > most) groups = most;
    }
    const int64_t items = r.runs * chunks * groups;
    int64_t tasks = work / kTaskElements;
    tasks = tasks < 1 ? 1 : tasks > items ? items : tasks;
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
        const int64_t group = i % groups, index = i / groups % chunks, run = i / groups / chunks;
        w.run_chunk(run, index, r.members * group / groups, r.members * (group + 1) / groups);
      }
    });
  })
}

void check_tokens(const TokenCheck& a) {
  *a.bad = a.tokens.wide ? first_outside<int64_t>(a.tokens.ids, a.tokens.count, a.vocabulary)
                         : first_outside<int32_t>(a.tokens.ids, a.tokens.count, a.vocabulary);
}

}  // namespace mmkern::MMKERN_ISA
