// Softmax of rows that lie side by side, one a lane: the dim summed over is not the last.
#pragma once

#include "cpu/parallel.h"
#include "cpu/softmax/scores.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kCachedColumns = 1024;  // elements of rows kept as float32: 256 KB
constexpr int64_t kColumnChunk = 32;      // of longer ones, in L1 from maximum to sum

template <class T, bool kLog>
class SoftmaxColumns {
  const SoftmaxArgs& a_;
  const bool masked_ = a_.kind == SoftmaxKind::masked;
  const Dropout dropout_{a_.dropout_p, a_.seed};
  const T* const x_ = static_cast<const T*>(a_.x.data);
  T* const out_ = static_cast<T*>(a_.out.data);

 public:
  explicit SoftmaxColumns(const SoftmaxArgs& a) : a_(a) {}

  // Rows first .. first + n side by side; x and out have unit stride across them.
  void run(const Cursor& at, int64_t first, int64_t n) const {
    const T* const x = x_ + at.x + first;
    const int64_t to = at.out + first;
    if (!masked_ && a_.cols > kCachedColumns) return long_columns(x, out_ + to, n);
    float* const s = static_cast<float*>(thread_scratch((a_.cols + 1) * kWidth * sizeof(float)));
    if (!masked_) return short_columns(x, a_.x.col, s, to, n);
    for (int64_t j = 0; j < a_.cols; ++j) {
      scores(a_, x + j * a_.x.col, 1, at.mask + j * a_.mask.col + first * a_.mask.inner,
             a_.mask.inner, at.bias + j * a_.bias.col + first * a_.bias.inner, a_.bias.inner,
             s + j * kWidth, s + a_.cols * kWidth, n);
    }
    short_columns(s, kWidth, s, to, n);
  }

 private:
  struct Columns {
    Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
    LongSum sum[4];
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
  void short_columns(const S* x, int64_t stride, float* s, int64_t to, int64_t n) const {
    Columns c;
    for (int64_t j = 0; j < a_.cols; ++j) {
      each_lane_vec(n, [&](int v, int i, int lanes) {
        c.top[v] = max(c.top[v], load_part(x + j * stride + i, lanes));
      });
    }
    for (int v = 0; masked_ && v < 4; ++v) {
      c.top[v] = select(equal(c.top[v], set1(-kInf)), zero(), c.top[v]);
    }
    for (int64_t j = 0; j < a_.cols;) {
      Vec part[4] = {zero(), zero(), zero(), zero()};
      for (const int64_t end = smaller(a_.cols, j + kSumVecs); j < end; ++j) {
        each_lane_vec(n, [&](int v, int i, int lanes) {
          const Vec difference = load_part(x + j * stride + i, lanes) - c.top[v];
          const Vec e = exp_to<T>(difference);
          store(s + j * kWidth + i, kLog ? difference : e);
          part[v] = part[v] + e;
        });
      }
      for (int v = 0; v < 4; ++v) c.sum[v].add(part[v]);
    }
    Vec last[4];
    for (int v = 0; v < 4; ++v) last[v] = finishing(c.sum[v].value());
    for (int64_t j = 0; j < a_.cols; ++j) {
      T* const out = out_ + to + j * a_.out.col;
      if (dropout_.on()) {
        float factors[2 * kWidth];
        element_factors(a_, dropout_, to + j * a_.out.col, 1, n, factors);
        each_lane_vec(n, [&](int v, int i, int lanes) {
          const Vec weight = load(s + j * kWidth + i) * last[v];
          store_part(out + i, drop(weight, load(factors + i)), lanes);
        });
        continue;
      }
      each_lane_vec(n, [&](int v, int i, int lanes) {
        const Vec e = load(s + j * kWidth + i);
        store_part(out + i, kLog ? e - last[v] : e * last[v], lanes);
      });
    }
  }

  void long_columns(const T* x, T* out, int64_t n) const {
    Columns c;
    for (int64_t j = 0; j < a_.cols; j += kColumnChunk) {
      const int64_t end = smaller(a_.cols, j + kColumnChunk);
      Vec top[4] = {c.top[0], c.top[1], c.top[2], c.top[3]};
      Vec part[4] = {zero(), zero(), zero(), zero()}, shift[4];
      for (int64_t i = j; i < end; ++i) {
        each_lane_vec(n, [&](int v, int lane, int lanes) {
          top[v] = max(top[v], load_part(x + i * a_.x.col + lane, lanes));
        });
      }
      for (int v = 0; v < 4; ++v) {
        // A NaN may or may not have stayed the maximum: the sum has it either way.
        shift[v] = select(equal(top[v], set1(-kInf)), zero(), top[v]);
        c.sum[v].scale(exp_to<T>(c.top[v] - shift[v]));
        c.top[v] = top[v];
      }
      for (int64_t i = j; i < end; ++i) {
        each_lane_vec(n, [&](int v, int lane, int lanes) {
          part[v] = part[v] + exp_to<T>(load_part(x + i * a_.x.col + lane, lanes) - shift[v]);
        });
      }
      for (int v = 0; v < 4; ++v) c.sum[v].add(part[v]);
    }
    Vec last[4];
    for (int v = 0; v < 4; ++v) last[v] = finishing(c.sum[v].value());
    for (int64_t j = 0; j < a_.cols; ++j) {
      each_lane_vec(n, [&](int v, int i, int lanes) {
        const Vec difference = load_part(x + j * a_.x.col + i, lanes) - c.top[v];
        store_part(out + j * a_.out.col + i,
                   kLog ? difference - last[v] : exp_to<T>(difference) * last[v], lanes);
      });
    }
  }
};

}  // namespace
}  // namespace mmkern::MMKERN_ISA
