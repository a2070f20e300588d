// Softmax, log-softmax and masked softmax along one dim.
//
//   m = max s, e = exp(s - m), out = e / sum e      or   (s - m) - log(sum e)
//
// Floor: one read and one write of memory. Three passes over a row that stays in cache: maximum (1
// instruction per kLanes elements), exponential and sum (13), scale (2). Scores with a mask are
// written to float32 scratch by the first pass. What is too long for the cache is read twice
// instead: once for maximum and sum together, once for the result.
#include "cpu/softmax.h"

#include "cpu/exp_to.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"
#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kTaskElements = 16384;  // per task: 10 microseconds or more
constexpr int64_t kGroupElements = 4096;  // rows that go through the passes together: 16 KB of L1
constexpr int64_t kGroupRows = 16;      // at most: the maximum of one hides behind the others' work
constexpr int64_t kCachedCols = 65536;  // longest row whose float32 copy (256 KB) is kept
constexpr int64_t kChunk = 4096;        // of a longer row, in L1 from maximum to sum
constexpr int64_t kSharedRows = 4;      // so few long rows are cut up between threads
constexpr int64_t kWidth = 4 * kLanes;  // rows side by side (64 on AVX-512: 256 bytes of float32)
constexpr int64_t kCachedColumns = 1024;  // elements of them kept as float32: 256 KB
constexpr int64_t kColumnChunk = 32;      // of a longer one, in L1 from maximum to sum
constexpr int64_t kSumVecs = 64;  // summed apart: rounding grows with 64 terms, not with the row

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int lanes_left(int64_t n) { return n < kLanes ? int(n) : kLanes; }

template <class T>
inline Vec load_part(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}

// Adds a term to n scores. Minus infinity and false hide an element whatever it holds, NaN
// included.
struct NoTerm {};
inline Vec add_term(Vec score, const NoTerm*, int64_t, int) { return score; }
inline Vec add_term(Vec score, const uint8_t* p, int64_t j, int n) {
  return select(n == kLanes ? load_mask(p + j) : load_mask_n(p + j, n), score, set1(-kInf));
}
template <class M>
inline Vec add_term(Vec score, const M* p, int64_t j, int n) {
  const Vec term = load_part(p + j, n);
  return select(equal(term, set1(-kInf)), term, score + term);
}

// s = scale * x + term, n of each; returns the maximum. s may be x.
template <class S, class M>
float write_scores(const S* x, float scale, const M* term, float* s, int64_t n) {
  Vec top = set1(-kInf);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec v = add_term(load(x + j) * set1(scale), term, j, kLanes);
    store(s + j, v);
    top = max(top, v);
  }
  if (const int left = int(n - j)) {
    const Vec v = add_term(load_n(x + j, left) * set1(scale), term, j, left);
    store_n(s + j, v, left);
    top = max(top, select(first_n(left), v, set1(-kInf)));
  }
  return reduce_max(top);
}

inline float term_value(uint8_t seen) { return seen ? 0.0f : -kInf; }
template <class M>
inline float term_value(M term) {
  return to_float(term);
}
template <class M>
const float* gather_term(const M* p, int64_t stride, float* t, int64_t n) {
  for (int64_t j = 0; j < n; ++j) t[j] = term_value(p[j * stride]);
  return t;
}
// The same for a term of any kind and stride; t: scratch for n floats.
template <class S, class M>
float write_scores(const S* x, float scale, const M* term, int64_t stride, float* s, float* t,
                   int64_t n) {
  if (stride == 1 || n == 1) return write_scores(x, scale, term, s, n);
  return write_scores(x, scale, gather_term(term, stride, t, n), s, n);
}
template <class S>
float write_scores(const S* x, float scale, MaskKind kind, const void* data, int64_t at,
                   int64_t stride, float* s, float* t, int64_t n) {
  const auto with = [&](auto* term) { return write_scores(x, scale, term + at, stride, s, t, n); };
  switch (kind) {
    case MaskKind::boolean: return with(static_cast<const uint8_t*>(data));
    case MaskKind::f32: return with(static_cast<const float*>(data));
    case MaskKind::bf16: return with(static_cast<const bf16*>(data));
    case MaskKind::f16: return with(static_cast<const f16*>(data));
    case MaskKind::none: break;
  }
  return write_scores(x, scale, static_cast<const NoTerm*>(nullptr), s, n);
}

template <class S>
float row_max(const S* x, int64_t n) {
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

// e = exp(x - shift), n of each, as exact as T; returns the sum. e may be x, or null. Meanwhile
// asks for `next`, n elements that will be read soon.
template <class T, bool kKeep, class S>
float write_exp(const S* x, float shift, float* e, const T* next, int64_t n) {
  Vec total = zero();
  int64_t j = 0;
  while (j + kLanes <= n) {
    Vec part = zero();
    const int64_t end = smaller(n - kLanes, j + (kSumVecs - 1) * kLanes);
    for (; j <= end; j += kLanes) {
      if (next) __builtin_prefetch(next + j);
      const Vec v = exp_to<T>(load(x + j) - set1(shift));
      if (kKeep) store(e + j, v);
      part = part + v;
    }
    total = total + part;
  }
  if (const int left = int(n - j)) {
    const Vec v = exp_to<T>(load_n(x + j, left) - set1(shift));
    if (kKeep) store_n(e + j, v, left);
    total = total + select(first_n(left), v, zero());
  }
  return reduce_add(total);
}

// out[j] = result(j, n), past the caches where the output would not stay there.
template <class T, class F>
void write_row(T* out, int64_t cols, bool streams, const F& result) {
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

// Where a row of each operand starts; steps through the outer dims in order.
class Cursor {
  const SoftmaxArgs& a_;
  int64_t index_[64];

 public:
  int64_t x = 0, mask = 0, bias = 0, out = 0;

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

 private:
  void move(int d, int64_t steps) {
    x += steps * a_.x.outer[d];
    out += steps * a_.out.outer[d];
    if (a_.mask_kind != MaskKind::none) mask += steps * a_.mask.outer[d];
    if (a_.bias_kind != MaskKind::none) bias += steps * a_.bias.outer[d];
  }
};

template <class T, bool kLog>
class Softmax {
  const SoftmaxArgs& a_;
  const bool masked_ = a_.kind == SoftmaxKind::masked;
  const T* const x_ = static_cast<const T*>(a_.x.data);
  T* const out_ = static_cast<T*>(a_.out.data);
  bool streams_ = false;

  struct Row {
    const T* x;
    T* out;
    float shift, total;
  };

 public:
  explicit Softmax(const SoftmaxArgs& a) : a_(a) {}

  void run() {
    int64_t rows = 1;
    for (int d = 0; d < a_.outer_dims; ++d) rows *= a_.outer_sizes[d];
    // Only memory that exists and is not the input's is better written past the caches.
    const int64_t bytes = rows * a_.inner * a_.cols * int64_t(sizeof(T));
    streams_ = bytes >= kStreamBytes && !a_.fresh && x_ != out_;
    const bool unit = a_.x.col == 1 && a_.out.col == 1;
    if (a_.inner == 1 && !masked_ && unit && a_.cols > kCachedCols) return long_rows(rows);
    // A unit is a row, or as many neighbouring rows as are worked on side by side.
    const int64_t width = a_.inner == 1 ? 1 : kWidth;
    const int64_t blocks = (a_.inner + width - 1) / width, units = rows * blocks;
    const int64_t share = kTaskElements / (a_.cols * smaller(width, a_.inner)) + 1;
    parallel_tasks((units + share - 1) / share, [&](int64_t task) {
      int64_t unit = task * share;
      const int64_t end = smaller(units, unit + share);
      Cursor at(a_, unit / blocks);
      if (a_.inner == 1) {
        row_group(at, end - unit);
      } else {
        for (; unit < end; ++unit) {
          const int64_t first = unit % blocks * width;
          columns(at, first, smaller(width, a_.inner - first));
          if ((unit + 1) % blocks == 0) at.next();
        }
      }
      if (streams_) stream_fence();
    });
  }

 private:
  // Scores of n elements of one row, or of n neighbouring rows, written to s: scale * x + bias +
  // mask. x_stride and the other strides are those between the n. Returns the maximum.
  float scores(const T* x, int64_t x_stride, const Cursor& at, int64_t mask_at, int64_t mask_stride,
               int64_t bias_at, int64_t bias_stride, float* s, float* t, int64_t n) const {
    const float scale = masked_ ? a_.scale : 1.0f;
    const bool both = a_.mask_kind != MaskKind::none && a_.bias_kind != MaskKind::none;
    const bool bias_first = a_.bias_kind != MaskKind::none;
    const MaskKind kind = bias_first ? a_.bias_kind : a_.mask_kind;
    const void* data = bias_first ? a_.bias.data : a_.mask.data;
    const int64_t place = bias_first ? at.bias + bias_at : at.mask + mask_at;
    const int64_t stride = bias_first ? bias_stride : mask_stride;
    float top;
    if (x_stride == 1) {
      top = write_scores(x, scale, kind, data, place, stride, s, t, n);
    } else {
      for (int64_t j = 0; j < n; ++j) s[j] = to_float(x[j * x_stride]);
      top = write_scores(s, scale, kind, data, place, stride, s, t, n);
    }
    if (!both) return top;
    return write_scores(s, 1.0f, a_.mask_kind, a_.mask.data, at.mask + mask_at, mask_stride, s, t,
                        n);
  }

  // Rows in groups, pass by pass: while one waits for its maximum or its sum, another computes.
  void row_group(Cursor& at, int64_t count) {
    const int64_t cols = a_.cols, padded = (cols + kLanes) / kLanes * kLanes;
    const int64_t most = larger(1, smaller(kGroupRows, kGroupElements / cols));
    float* const scratch =
        static_cast<float*>(thread_scratch((smaller(most, count) + 1) * padded * sizeof(float)));
    float* const spare = scratch + smaller(most, count) * padded;
    const bool from_x = !masked_ && a_.x.col == 1;
    Row group[kGroupRows];
    for (int64_t first = 0; first < count; first += most) {
      const int64_t rows = smaller(most, count - first);
      for (int64_t r = 0; r < rows; ++r) {
        Row& row = group[r];
        row.x = x_ + at.x, row.out = out_ + at.out;
        const float top = from_x ? row_max(row.x, cols)
                                 : scores(row.x, a_.x.col, at, 0, a_.mask.col, 0, a_.bias.col,
                                          scratch + r * padded, spare, cols);
        row.shift = masked_ && top == -kInf ? 0.0f : top;
        at.next();
      }
      // The row that far ahead, where there is one.
      const T* const next = from_x && first + rows < count ? x_ + at.x : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        Row& row = group[r];
        float* const s = scratch + r * padded;
        const T* const ahead = next && row.x != next ? next + (row.x - group[0].x) : nullptr;
        row.total = from_x ? write_exp<T, !kLog>(row.x, row.shift, s, ahead, cols)
                           : write_exp<T, !kLog>(s, row.shift, s, ahead, cols);
      }
      for (int64_t r = 0; r < rows; ++r) finish(group[r], scratch + r * padded, from_x);
    }
  }

  // Exponentials wait in s; so do the scores that a logarithm starts from, unless x has them.
  void finish(const Row& row, const float* s, bool from_x) const {
    if (kLog) {
      const Vec shift = set1(row.shift), log_total = set1(logf(row.total));
      if (from_x)
        return scatter(
            row.out, [&](int64_t j, int n) { return load_part(row.x + j, n) - shift - log_total; });
      return scatter(row.out,
                     [&](int64_t j, int n) { return load_part(s + j, n) - shift - log_total; });
    }
    const Vec factor = set1(masked_ && row.total == 0.0f ? 0.0f : 1.0f / row.total);
    scatter(row.out, [&](int64_t j, int n) { return load_part(s + j, n) * factor; });
  }

  // A row of the output, whatever its stride.
  template <class F>
  void scatter(T* out, const F& result) const {
    if (a_.out.col == 1) return write_row(out, a_.cols, streams_, result);
    for (int64_t j = 0; j < a_.cols; j += kLanes) {
      float lanes[kLanes];
      const int n = lanes_left(a_.cols - j);
      store(lanes, result(j, n));
      for (int i = 0; i < n; ++i) from_float(lanes[i], out + (j + i) * a_.out.col);
    }
  }

  struct Part {
    float top, total;
  };

  // Chunks of a row by whoever is free, joined in order: the same result however they are shared
  // out.
  void long_rows(int64_t rows) {
    if (rows > kSharedRows) {
      return parallel_tasks(rows, [&](int64_t row) { long_row(Cursor(a_, row), false); });
    }
    for (Cursor at(a_, 0); rows > 0; --rows, at.next()) long_row(at, true);
  }

  void long_row(const Cursor& at, bool shared) {
    const T* const x = x_ + at.x;
    T* const out = out_ + at.out;
    const int64_t chunks = (a_.cols + kChunk - 1) / kChunk;
    Part* const parts = static_cast<Part*>(thread_scratch(chunks * sizeof(Part)));
    const auto each_chunk = [&](const auto& f) {
      const int64_t share = shared ? kTaskElements / kChunk : chunks;
      const auto task = [&](int64_t task) {
        for (int64_t c = task * share; c < smaller(chunks, (task + 1) * share); ++c) {
          f(c, c * kChunk, smaller(kChunk, a_.cols - c * kChunk));
        }
        if (streams_) stream_fence();
      };
      if (shared) {
        parallel_tasks((chunks + share - 1) / share, task);
      } else {
        task(0);
      }
    };
    each_chunk([&](int64_t c, int64_t j, int64_t n) {
      const float top = row_max(x + j, n), shift = top == -kInf ? 0.0f : top;
      parts[c] = {top, write_exp<T, false>(x + j, shift, nullptr, static_cast<T*>(nullptr), n)};
    });
    float m = -kInf, total = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) m = parts[c].top > m ? parts[c].top : m;
    for (int64_t c = 0; c < chunks; ++c) {
      const float top = parts[c].top == -kInf ? m : parts[c].top;  // its sum is 0 or NaN
      total += parts[c].total * (top == m ? 1.0f : expf(top - m));
    }
    // Nothing but minus infinity, or a positive infinity: NaN, as inf - inf is.
    const Vec shift = set1(m), factor = set1(1.0f / total), log_total = set1(logf(total));
    each_chunk([&](int64_t, int64_t j, int64_t n) {
      write_row(out + j, n, streams_, [&](int64_t i, int lanes) {
        const Vec difference = load_part(x + j + i, lanes) - shift;
        return kLog ? difference - log_total : exp_to<T>(difference) * factor;
      });
    });
  }

  // Rows first .. first + n side by side, one a lane; x and out have unit stride across them.
  void columns(const Cursor& at, int64_t first, int64_t n) {
    const T* const x = x_ + at.x + first;
    T* const out = out_ + at.out + first;
    if (!masked_ && a_.cols > kCachedColumns) return long_columns(x, out, n);
    float* const s = static_cast<float*>(thread_scratch((a_.cols + 1) * kWidth * sizeof(float)));
    if (masked_) {
      for (int64_t j = 0; j < a_.cols; ++j) {
        scores(x + j * a_.x.col, 1, at, j * a_.mask.col + first * a_.mask.inner, a_.mask.inner,
               j * a_.bias.col + first * a_.bias.inner, a_.bias.inner, s + j * kWidth,
               s + a_.cols * kWidth, n);
      }
      return short_columns(s, kWidth, s, out, n);
    }
    short_columns(x, a_.x.col, s, out, n);
  }

  // Calls f(v, first lane, lanes) for each vector of n rows side by side.
  template <class F>
  static void each_vec(int64_t n, const F& f) {
    if (n == kWidth) {
      for (int v = 0; v < 4; ++v) f(v, v * kLanes, kLanes);
    } else {
      for (int v = 0; v * kLanes < n; ++v) f(v, v * kLanes, lanes_left(n - v * kLanes));
    }
  }

  struct Columns {
    Vec top[4], total[4];
    Columns() {
      for (int v = 0; v < 4; ++v) top[v] = set1(-kInf), total[v] = zero();
    }
  };

  // What to multiply an exponential by, or to subtract from x - top.
  Vec finishing(Vec total) const {
    float lanes[kLanes];
    store(lanes, total);
    for (float& each : lanes) {
      each = kLog ? logf(each) : masked_ && each == 0.0f ? 0.0f : 1.0f / each;
    }
    return load(lanes);
  }

  template <class S>
  void short_columns(const S* x, int64_t stride, float* s, T* out, int64_t n) {
    Columns c;
    for (int64_t j = 0; j < a_.cols; ++j) {
      each_vec(n, [&](int v, int i, int lanes) {
        c.top[v] = max(c.top[v], load_part(x + j * stride + i, lanes));
      });
    }
    for (int v = 0; masked_ && v < 4; ++v) {
      c.top[v] = select(equal(c.top[v], set1(-kInf)), zero(), c.top[v]);
    }
    for (int64_t j = 0; j < a_.cols;) {
      Vec part[4] = {zero(), zero(), zero(), zero()};
      for (const int64_t end = smaller(a_.cols, j + kSumVecs); j < end; ++j) {
        each_vec(n, [&](int v, int i, int lanes) {
          const Vec difference = load_part(x + j * stride + i, lanes) - c.top[v];
          const Vec e = exp_to<T>(difference);
          store(s + j * kWidth + i, kLog ? difference : e);
          part[v] = part[v] + e;
        });
      }
      for (int v = 0; v < 4; ++v) c.total[v] = c.total[v] + part[v];
    }
    for (Vec& total : c.total) total = finishing(total);
    for (int64_t j = 0; j < a_.cols; ++j) {
      each_vec(n, [&](int v, int i, int lanes) {
        const Vec e = load(s + j * kWidth + i);
        write_vec(out + j * a_.out.col + i, kLog ? e - c.total[v] : e * c.total[v], lanes);
      });
    }
  }

  void long_columns(const T* x, T* out, int64_t n) {
    Columns c;
    for (int64_t j = 0; j < a_.cols; j += kColumnChunk) {
      const int64_t end = smaller(a_.cols, j + kColumnChunk);
      Vec top[4] = {c.top[0], c.top[1], c.top[2], c.top[3]};
      Vec part[4] = {zero(), zero(), zero(), zero()}, shift[4];
      for (int64_t i = j; i < end; ++i) {
        each_vec(n, [&](int v, int lane, int lanes) {
          top[v] = max(top[v], load_part(x + i * a_.x.col + lane, lanes));
        });
      }
      for (int v = 0; v < 4; ++v) {
        // A NaN may or may not have stayed the maximum: the sum has it either way.
        shift[v] = select(equal(top[v], set1(-kInf)), zero(), top[v]);
        c.total[v] = c.total[v] * exp_to<T>(c.top[v] - shift[v]);
        c.top[v] = top[v];
      }
      for (int64_t i = j; i < end; ++i) {
        each_vec(n, [&](int v, int lane, int lanes) {
          part[v] = part[v] + exp_to<T>(load_part(x + i * a_.x.col + lane, lanes) - shift[v]);
        });
      }
      for (int v = 0; v < 4; ++v) c.total[v] = c.total[v] + part[v];
    }
    Vec last[4];
    for (int v = 0; v < 4; ++v) last[v] = finishing(c.total[v]);
    for (int64_t j = 0; j < a_.cols; ++j) {
      each_vec(n, [&](int v, int i, int lanes) {
        const Vec difference = load_part(x + j * a_.x.col + i, lanes) - c.top[v];
        write_vec(out + j * a_.out.col + i,
                  kLog ? difference - last[v] : exp_to<T>(difference) * last[v], lanes);
      });
    }
  }

  void write_vec(T* out, Vec v, int lanes) const {
    if (lanes < kLanes) {
      store_n(out, v, lanes);
    } else {
      store(out, v);
    }
  }
};

}  // namespace

void softmax(const SoftmaxArgs& a) {
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    if (a.kind == SoftmaxKind::log_softmax) {
      Softmax<T, true>(a).run();
    } else {
      Softmax<T, false>(a).run();
    }
  })
}

}  // namespace mmkern::MMKERN_ISA
