// Softmax, log-softmax and masked softmax along one dim.
//
//   m = max s, e = exp(s - m), out = e / sum e      or   (s - m) - log(sum e)
//
// Floor: one read and one write of memory. Three passes over a row that stays in cache: maximum (1
// instruction per kLanes elements), exponential and sum (15), scale (2); some 20 cycles per vector
// where memory takes 40. A row too long for the cache is read twice instead: once for maximum and
// sum together, once for the result.
#include "cpu/softmax.h"

#include "cpu/mask.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"
#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kTaskElements = 16384;  // per task: 10 microseconds or more
constexpr int64_t kCachedCols =
    65536;                        // longest row whose float32 copy (256 KB) is kept between passes
constexpr int64_t kChunk = 4096;  // of a longer row, that stays in L1 from maximum to sum
constexpr int kColumnVecs = 4;    // vectors of neighbouring rows side by side (64 rows on AVX-512)

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int lanes_left(int64_t n) { return n < kLanes ? int(n) : kLanes; }

template <class T>
inline Vec load_part(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T>
inline void store_strided(T* p, int64_t stride, Vec x, int n) {
  if (stride == 1) return store_n(p, x, n);
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) from_float(lanes[i], p + i * stride);
}

// The maximum of the first n lanes of each vector; lanes beyond are ignored.
inline Vec max_part(Vec top, Vec x, int n) {
  return max(top, n == kLanes ? x : select(first_n(n), x, set1(-kInf)));
}

// A sum in two levels, so that rounding errors grow with 64 terms and not with the length of a row.
class Sum {
  Vec part_ = zero(), total_ = zero();
  int terms_ = 0;

 public:
  void add(Vec x) {
    part_ = part_ + x;
    if (++terms_ < 64) return;
    total_ = total_ + part_;
    part_ = zero();
    terms_ = 0;
  }
  void add(Vec x, int n) { add(n == kLanes ? x : select(first_n(n), x, zero())); }
  Vec value() const { return total_ + part_; }
};

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

template <class T>
class Softmax {
  const SoftmaxArgs& a_;
  const bool log_ = a_.kind == SoftmaxKind::log_softmax, masked_ = a_.kind == SoftmaxKind::masked;
  const T* const x_ = static_cast<const T*>(a_.x.data);
  T* const out_ = static_cast<T*>(a_.out.data);
  bool stream_ = false;

 public:
  explicit Softmax(const SoftmaxArgs& a) : a_(a) {}

  void run() {
    int64_t rows = 1;
    for (int d = 0; d < a_.outer_dims; ++d) rows *= a_.outer_sizes[d];
    // Only memory that exists and is not the input's is better written past the caches.
    const int64_t bytes = rows * a_.inner * a_.cols * int64_t(sizeof(T));
    stream_ = bytes >= kStreamBytes && !a_.fresh && a_.x.data != a_.out.data;
    // A unit is a row, or as many neighbouring rows as are worked on side by side.
    const int64_t width = a_.inner == 1 ? 1 : kColumnVecs * kLanes;
    const int64_t blocks = (a_.inner + width - 1) / width, units = rows * blocks;
    const int64_t share = kTaskElements / (a_.cols * smaller(width, a_.inner)) + 1;
    parallel_tasks((units + share - 1) / share, [&](int64_t task) {
      int64_t unit = task * share;
      const int64_t end = smaller(units, unit + share);
      Cursor at(a_, unit / blocks);
      for (; unit < end; ++unit) {
        if (a_.inner == 1) {
          row(at);
        } else {
          const int64_t first = unit % blocks * width;
          columns(at, first, smaller(width, a_.inner - first));
        }
        if ((unit + 1) % blocks == 0) at.next();
      }
      if (stream_) stream_fence();
    });
  }

 private:
  Vec score(const Cursor& at, int64_t col, int64_t inner, bool along, int n) const {
    const auto place = [&](const SoftmaxOperand& o) { return col * o.col + inner * o.inner; };
    const auto stride = [&](const SoftmaxOperand& o) { return along ? o.col : o.inner; };
    Vec s = load_strided(x_ + at.x + place(a_.x), stride(a_.x), n);
    if (!masked_) return s;
    s = s * set1(a_.scale);
    s = apply_mask(a_.bias_kind, s, a_.bias.data, at.bias + place(a_.bias), stride(a_.bias), n,
                   1.0f);
    return apply_mask(a_.mask_kind, s, a_.mask.data, at.mask + place(a_.mask), stride(a_.mask), n,
                      1.0f);
  }

  void row(const Cursor& at) {
    if (!masked_ && a_.x.col == 1 && a_.out.col == 1) {
      if (a_.cols > kCachedCols) return long_row(x_ + at.x, out_ + at.out);
      return log_ ? plain_row<true>(x_ + at.x, out_ + at.out)
                  : plain_row<false>(x_ + at.x, out_ + at.out);
    }
    float* s = static_cast<float*>(thread_scratch((a_.cols + kLanes) * sizeof(float)));
    Vec top = set1(-kInf);
    for (int64_t j = 0; j < a_.cols; j += kLanes) {
      const int n = lanes_left(a_.cols - j);
      const Vec v = score(at, j, 0, true, n);
      store(s + j, v);
      top = max_part(top, v, n);
    }
    const float m = reduce_max(top);
    const Vec shift = set1(masked_ && m == -kInf ? 0.0f : m);
    Sum sum;
    for (int64_t j = 0; j < a_.cols; j += kLanes) {
      const Vec difference = load(s + j) - shift, e = exp(difference);
      store(s + j, log_ ? difference : e);
      sum.add(e, lanes_left(a_.cols - j));
    }
    const float total = reduce_add(sum.value());
    const Vec factor = set1(total == 0.0f ? 0.0f : 1.0f / total), log_total = set1(logf(total));
    const auto result = [&](int64_t j, int) {
      return log_ ? load(s + j) - log_total : load(s + j) * factor;
    };
    if (a_.out.col == 1) return write_row(out_ + at.out, result);
    for (int64_t j = 0; j < a_.cols; j += kLanes) {
      const int n = lanes_left(a_.cols - j);
      store_strided(out_ + at.out + j * a_.out.col, a_.out.col, result(j, n), n);
    }
  }

  // Unit strides, no mask. Exponentials wait in the output itself where that is float32 and cached.
  template <bool kLog>
  void plain_row(const T* x, T* out) {
    float* e = sizeof(T) == sizeof(float) && !stream_
                   ? reinterpret_cast<float*>(out)
                   : static_cast<float*>(thread_scratch((a_.cols + kLanes) * sizeof(float)));
    const int64_t whole = a_.cols / kLanes * kLanes;
    const int left = int(a_.cols - whole);
    const Vec shift = set1(row_max(x, a_.cols));
    Sum sum;
    for (int64_t j = 0; j < whole; j += kLanes) {
      __builtin_prefetch(x + a_.cols +
                         j);  // the next row comes from memory while this one computes
      const Vec v = exp(load(x + j) - shift);
      if (!kLog) store(e + j, v);
      sum.add(v);
    }
    if (left) {
      const Vec v = exp(load_n(x + whole, left) - shift);
      if (!kLog) store_n(e + whole, v, left);
      sum.add(v, left);
    }
    const float total = reduce_add(sum.value());
    if (kLog) {
      const Vec log_total = set1(logf(total));
      write_row(out, [&](int64_t j, int n) { return load_part(x + j, n) - shift - log_total; });
    } else {
      const Vec factor = set1(1.0f / total);
      write_row(out, [&](int64_t j, int n) { return load_part(e + j, n) * factor; });
    }
  }

  // Writes result(j, n) for elements j .. j + n of a row, past the caches where it would not stay
  // there.
  template <class F>
  void write_row(T* out, const F& result) const {
    int64_t j = 0;
    if (stream_) {
      while (j < a_.cols && !stream_aligned(out + j)) ++j;
      const int64_t whole = j + (a_.cols - j) / kLanes * kLanes;
      for (int64_t i = 0; i < j; i += kLanes) {
        store_n(out + i, result(i, lanes_left(j - i)), lanes_left(j - i));
      }
      for (; j < whole; j += kLanes) stream(out + j, result(j, kLanes));
    }
    for (; j + kLanes <= a_.cols; j += kLanes) store(out + j, result(j, kLanes));
    if (j < a_.cols) store_n(out + j, result(j, int(a_.cols - j)), int(a_.cols - j));
  }

  static float row_max(const T* x, int64_t cols) {
    Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) top[i] = max(top[i], load(x + j + i * kLanes));
    }
    for (; j < cols; j += kLanes) {
      const int n = lanes_left(cols - j);
      top[0] = max_part(top[0], load_part(x + j, n), n);
    }
    return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  }

  void long_row(const T* x, T* out) {
    float m = -kInf, total = 0.0f;
    for (int64_t j = 0; j < a_.cols; j += kChunk) {
      const int64_t end = smaller(a_.cols, j + kChunk);
      const float top = row_max(x + j, end - j), next = top > m ? top : m;
      Sum sum;
      for (int64_t i = j; i < end; i += kLanes) {
        const int n = lanes_left(end - i);
        sum.add(exp(load_part(x + i, n) - set1(next == -kInf ? 0.0f : next)), n);
      }
      total =
          (m == -kInf ? 0.0f : total * first_lane(exp(set1(m - next)))) + reduce_add(sum.value());
      m = next;
    }
    // Nothing but minus infinity, or a positive infinity: NaN, as inf - inf is.
    const Vec shift = set1(m), factor = set1(1.0f / total), log_total = set1(logf(total));
    write_row(out, [&](int64_t j, int n) {
      const Vec difference = load_part(x + j, n) - shift;
      return log_ ? difference - log_total : exp(difference) * factor;
    });
  }

  // Rows first .. first + n side by side, one a lane.
  void columns(const Cursor& at, int64_t first, int64_t n) {
    constexpr int64_t width = kColumnVecs * kLanes;
    float* s = static_cast<float*>(thread_scratch(a_.cols * width * sizeof(float)));
    for (int64_t v = 0; v < n; v += kLanes) {
      const int lanes = lanes_left(n - v);
      Vec top = set1(-kInf);
      for (int64_t j = 0; j < a_.cols; ++j) {
        const Vec x = score(at, j, first + v, false, lanes);
        store(s + j * width + v, x);
        top = max(top, x);  // a NaN may be lost here: it comes back with the sum
      }
      const Vec shift = masked_ ? select(equal(top, set1(-kInf)), zero(), top) : top;
      Sum sum;
      for (int64_t j = 0; j < a_.cols; ++j) {
        const Vec difference = load(s + j * width + v) - shift, e = exp(difference);
        store(s + j * width + v, log_ ? difference : e);
        sum.add(e);
      }
      float totals[kLanes];
      store(totals, sum.value());
      for (int i = 0; i < lanes; ++i) {
        totals[i] = log_ ? logf(totals[i]) : totals[i] == 0.0f ? 0.0f : 1.0f / totals[i];
      }
      const Vec total = load(totals);
      for (int64_t j = 0; j < a_.cols; ++j) {
        const Vec x = load(s + j * width + v);
        store_strided(out_ + at.out + j * a_.out.col + (first + v) * a_.out.inner, a_.out.inner,
                      log_ ? x - total : x * total, lanes);
      }
    }
  }
};

}  // namespace

void softmax(const SoftmaxArgs& a) { MMKERN_SWITCH_DTYPE(a.dtype, T, Softmax<T>(a).run()) }

}  // namespace mmkern::MMKERN_ISA
