// Softmax, log-softmax and masked softmax along one dim.
//
//   m = max s, e = exp(s - m), out = e / sum e      or   (s - m) - log(sum e)
//
// Floor: one read and one write of memory. Three passes over a row that stays in cache: maximum (1
// instruction per kLanes elements), exponential and sum (13), scale (2; with dropout 130 more for
// the random words). Scores with a mask are written to float32 scratch by the first pass. What is
// too long for the cache is read twice instead: once for maximum and sum together, once for the
// result.
#include "cpu/parallel.h"
#include "cpu/softmax/columns.isa.h"
#include "cpu/softmax/rows.isa.h"
#include "cpu/softmax/scores.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kGroupElements = 4096;  // rows that go through the passes together: 16 KB of L1
constexpr int64_t kGroupRows = 16;  // at most: the maximum of one hides behind the others' work

template <class T, bool kLog>
class Softmax {
  const SoftmaxArgs& a_;
  const bool masked_ = a_.kind == SoftmaxKind::masked;
  const Dropout dropout_{a_.dropout_p, a_.seed};
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
    const int64_t rows = row_count(a_);
    // Only memory that exists and is not the input's is better written past the caches.
    const int64_t bytes = rows * a_.inner * a_.cols * int64_t(sizeof(T));
    streams_ = bytes >= kStreamBytes && !a_.fresh && x_ != out_;
    const bool unit = a_.x.col == 1 && a_.out.col == 1;
    if (a_.inner == 1 && !masked_ && unit && a_.cols > kCachedCols) return long_rows(rows);
    // A unit is a row, or as many neighbouring rows as are worked on side by side.
    const int64_t width = a_.inner == 1 ? 1 : kWidth;
    const int64_t blocks = (a_.inner + width - 1) / width, units = rows * blocks;
    const int64_t share = kTaskElements / (a_.cols * smaller(width, a_.inner)) + 1;
    const SoftmaxColumns<T, kLog> columns(a_);
    parallel_tasks((units + share - 1) / share, [&](int64_t task) {
      int64_t unit = task * share;
      const int64_t end = smaller(units, unit + share);
      Cursor at(a_, unit / blocks);
      if (a_.inner == 1) {
        row_group(at, end - unit);
      } else {
        for (; unit < end; ++unit) {
          const int64_t first = unit % blocks * width;
          columns.run(at, first, smaller(width, a_.inner - first));
          if ((unit + 1) % blocks == 0) at.next();
        }
      }
      if (streams_) stream_fence();
    });
  }

 private:
  // Rows in groups, pass by pass: while one waits for its maximum or its sum, another computes.
  void row_group(Cursor& at, int64_t count) {
    const int64_t cols = a_.cols, padded = (cols + kLanes) / kLanes * kLanes;
    const int64_t most = larger(1, smaller(kGroupRows, kGroupElements / cols));
    const int64_t length = (smaller(most, count) + 1) * padded + 4 * kLanes;
    float* const scratch = static_cast<float*>(thread_scratch(length * sizeof(float)));
    float* const spare = scratch + smaller(most, count) * padded;
    const bool from_x = !masked_ && a_.x.col == 1;
    Row group[kGroupRows];
    for (int64_t first = 0; first < count; first += most) {
      const int64_t rows = smaller(most, count - first);
      for (int64_t r = 0; r < rows; ++r) {
        Row& row = group[r];
        row.x = x_ + at.x, row.out = out_ + at.out;
        const float top = from_x ? row_max(row.x, cols)
                                 : row_scores(a_, row.x, a_.x.col, at, scratch + r * padded, spare);
        row.shift = masked_ && top == -kInf ? 0.0f : top;
        at.next();
      }
      // The row that far ahead, where there is one.
      const T* const next = from_x && first + rows < count ? x_ + at.x : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        Row& row = group[r];
        float* const s = scratch + r * padded;
        const T* const ahead = next && row.x != next ? next + (row.x - group[0].x) : nullptr;
        row.total = float(from_x ? write_exp<T, !kLog>(row.x, row.shift, s, ahead, cols)
                                 : write_exp<T, !kLog>(s, row.shift, s, ahead, cols));
      }
      for (int64_t r = 0; r < rows; ++r) finish(group[r], scratch + r * padded, spare, from_x);
    }
  }

  // Exponentials wait in s; so do the scores that a logarithm starts from, unless x has them.
  void finish(const Row& row, const float* s, float* spare, bool from_x) const {
    if (kLog) {
      const Vec shift = set1(row.shift), log_total = set1(logf(row.total));
      if (from_x) {
        return write(row.out,
                     [=](int64_t j, int n) { return load_part(row.x + j, n) - shift - log_total; });
      }
      return write(row.out,
                   [=](int64_t j, int n) { return load_part(s + j, n) - shift - log_total; });
    }
    const Vec factor = set1(masked_ && row.total == 0.0f ? 0.0f : 1.0f / row.total);
    if (dropout_.on()) {
      element_factors(a_, dropout_, row.out - out_, a_.out.col, a_.cols, spare);
      return write(row.out, [=](int64_t j, int n) {
        return drop(load_part(s + j, n) * factor, load_part(spare + j, n));
      });
    }
    write(row.out, [=](int64_t j, int n) { return load_part(s + j, n) * factor; });
  }

  template <class F>
  void write(T* out, F result) const {
    write_row(out, a_.out.col, a_.cols, streams_, result);
  }

  struct Part {
    double total;
    float top;
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
    each_chunk(a_.cols, shared, false, [&](int64_t c, int64_t j, int64_t n) {
      const float top = row_max(x + j, n), shift = top == -kInf ? 0.0f : top;
      parts[c] = {write_exp<T, false>(x + j, shift, nullptr, static_cast<T*>(nullptr), n), top};
    });
    float m = -kInf;
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) m = parts[c].top > m ? parts[c].top : m;
    for (int64_t c = 0; c < chunks; ++c) {
      const float top = parts[c].top == -kInf ? m : parts[c].top;  // its sum is 0 or NaN
      sum += parts[c].total * (top == m ? 1.0f : expf(top - m));
    }
    const float total = float(sum);
    // Nothing but minus infinity, or a positive infinity: NaN, as inf - inf is.
    const Vec shift = set1(m), factor = set1(1.0f / total), log_total = set1(logf(total));
    each_chunk(a_.cols, shared, streams_, [&](int64_t, int64_t j, int64_t n) {
      write_row(out + j, n, streams_, [=](int64_t i, int lanes) {
        const Vec difference = load_part(x + j + i, lanes) - shift;
        return kLog ? difference - log_total : exp_to<T>(difference) * factor;
      });
    });
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
