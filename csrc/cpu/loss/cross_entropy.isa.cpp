// Cross-entropy and its gradient in one pass.
//
//   b_c = w_c t'_c, S = sum_c b_c      t' = (1 - smoothing) t + smoothing / classes
//   m = max x, e = exp(x - m), Z = sum e
//   loss = S log Z - sum_c b_c (x_c - m)          grad_c = S e_c / Z - b_c
//
// With class indices t is 1 at the target and 0 elsewhere. Floor: one read of x, one write of grad.
// A row goes chunk by chunk through maximum and exponential, each chunk in L1 and relative to its
// own maximum; exponentials wait in grad itself (float32) or in scratch until Z is known, in L2 up
// to 128k classes.
#include "cpu/loss/cross_entropy.h"

#include "cpu/parallel.h"
#include "cpu/simd/row_steps.isa.h"
#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kTaskElements = 16384;  // per task: 10 microseconds or more
constexpr int64_t kChunk = 4096;          // of a row: 16 KB of L1
constexpr int64_t kSumVecs = 64;  // summed apart: rounding grows with 64 terms, not with the row
constexpr int64_t kWidth = 4 * kLanes;  // positions side by side

enum class Target { index, smooth, soft };

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int lanes_left(int64_t n) { return n < kLanes ? int(n) : kLanes; }

template <class T>
void store_part(T* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// Calls f(j, lanes) for each vector of [0, n).
template <class F>
inline void each_vec(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, kLanes);
  if (j < n) f(j, int(n - j));
}

// What a stretch of a row adds up to, relative to `shift`.
struct Sums {
  float shift, total, weight, dot;  // sum e, sum b, sum b (x - shift)
  bool empty;                       // nothing but minus infinity
};

template <class T, class S, Target kTarget>
class CrossEntropy {
  const CrossEntropyArgs& a_;
  const bool wants_grad_ = a_.grad.data != nullptr;
  const float keep_ = 1.0f - a_.label_smoothing;
  const float smooth_ = a_.label_smoothing / float(a_.classes);

  struct Position {
    float loss, scale;  // grad = e * scale - factor * b
    float at_target;    // the second term there
  };

 public:
  explicit CrossEntropy(const CrossEntropyArgs& a) : a_(a) {}

  void run() {
    const int64_t width = a_.columns ? kWidth : 1;
    const int64_t blocks = (a_.inner + width - 1) / width, units = a_.batch * blocks;
    const int64_t share = kTaskElements / (a_.classes * smaller(width, a_.inner) + 1) + 1;
    parallel_tasks((units + share - 1) / share, [&](int64_t task) {
      for (int64_t unit = task * share; unit < smaller(units, (task + 1) * share); ++unit) {
        const int64_t n = unit / blocks, first = unit % blocks * width;
        if (a_.columns) {
          columns(n, first, smaller(width, a_.inner - first));
        } else {
          row(n, first);
        }
      }
    });
  }

 private:
  template <class U>
  static U* at(const ClassOperand& t, int64_t n, int64_t i) {
    return t.data ? static_cast<U*>(t.data) + n * t.n + i * t.i : nullptr;
  }
  float weight(int64_t c) const { return a_.weight ? a_.weight[c] : 1.0f; }

  // b without the target's own share, which `finish` adds.
  Vec coefficient(const S* soft, int64_t j, int n) const {
    Vec b = set1(smooth_);
    if constexpr (kTarget == Target::soft) b = fma(load_part(soft + j, n), set1(keep_), b);
    return a_.weight ? b * load_part(a_.weight + j, n) : b;
  }

  Position finish(int64_t target, float x_target, float shift, float total, float b,
                  float dot) const {
    float b_target = 0.0f;
    if constexpr (kTarget != Target::soft) {
      const float hit = keep_ * weight(target);
      b = b_target = hit;
      if constexpr (kTarget == Target::smooth) {
        b += smooth_ * a_.weight_sum;
        b_target += smooth_ * weight(target);
      }
      dot += hit * (x_target - shift);
    }
    return {b * logf(total) - dot, b / total * a_.factor, b_target * a_.factor};
  }

  // Sums over n classes; writes their exponentials to e unless it is null.
  template <bool kKeep>
  Sums sums(const T* x, const S* soft, int64_t first, float* e, int64_t n) const {
    const float top = row_max(x, n);
    Sums s{top == -kInf ? 0.0f : top, 0.0f, 0.0f, 0.0f, top == -kInf};
    const Vec shift = set1(s.shift);
    Vec total = zero(), weight = zero(), dot = zero();
    for (int64_t j = 0; j < n; j += kSumVecs * kLanes) {
      Vec part = zero(), weight_part = zero(), dot_part = zero();
      each_vec(smaller(n - j, kSumVecs * kLanes), [&](int64_t i, int lanes) {
        const Mask valid = first_n(lanes);
        const Vec v = load_part(x + j + i, lanes) - shift, p = exp_to<float>(v);
        if (kKeep) store_part(e + j + i, p, lanes);
        part = part + (lanes == kLanes ? p : select(valid, p, zero()));
        if constexpr (kTarget != Target::index) {
          const Vec b = coefficient(soft, first + j + i, lanes);
          const Vec term = b * v;
          dot_part = dot_part + (lanes == kLanes ? term : select(valid, term, zero()));
          weight_part = weight_part + (lanes == kLanes ? b : select(valid, b, zero()));
        }
      });
      total = total + part, weight = weight + weight_part, dot = dot + dot_part;
    }
    s.total = reduce_add(total), s.weight = reduce_add(weight), s.dot = reduce_add(dot);
    return s;
  }

  void row(int64_t n, int64_t i) const {
    const int64_t classes = a_.classes, chunks = (classes + kChunk - 1) / kChunk;
    const T* const x = at<T>(a_.x, n, i);
    const S* const soft = at<S>(a_.soft, n, i);
    T* const grad = at<T>(a_.grad, n, i);
    S* const grad_soft = at<S>(a_.grad_soft, n, i);
    float& loss = a_.loss[n * a_.inner + i];
    const int64_t target = kTarget == Target::soft ? 0 : a_.target[n * a_.inner + i];
    if (kTarget != Target::soft && (target == a_.ignore_index || !has_class(a_, target))) {
      loss = 0.0f;
      if (grad)
        each_vec(classes, [&](int64_t j, int lanes) { store_part(grad + j, zero(), lanes); });
      return;
    }
    constexpr bool kInPlace = sizeof(T) == sizeof(float);
    const int64_t kept = kInPlace || !grad ? 0 : (classes + kLanes - 1) / kLanes * kLanes;
    float* const scratch =
        static_cast<float*>(thread_scratch(kept * sizeof(float) + chunks * sizeof(Sums)));
    Sums* const parts = reinterpret_cast<Sums*>(scratch + kept);
    float* e = scratch;
    if constexpr (kInPlace) e = grad;
    float top = -kInf;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t j = c * kChunk, many = smaller(kChunk, classes - j);
      parts[c] =
          grad ? sums<true>(x + j, soft, j, e + j, many) : sums<false>(x + j, soft, j, e, many);
      if (!parts[c].empty && !(parts[c].shift <= top)) top = parts[c].shift;
    }
    double sum = 0.0, weights = 0.0, dots = 0.0;
    for (int64_t c = 0; c < chunks; ++c) {
      Sums& part = parts[c];
      const float up = part.empty ? 1.0f : expf(part.shift - top);  // its sum is 0, or NaN
      sum += double(part.total) * up;
      weights += part.weight;
      dots += part.dot;
      if (part.weight != 0.0f) dots += (double(part.shift) - top) * part.weight;
      part.total = up;
    }
    const float total = top == -kInf && classes > 0 ? __builtin_nanf("") : float(sum);  // inf - inf
    const float x_target = kTarget == Target::soft ? 0.0f : to_float(x[target]);
    const Position p = finish(target, x_target, top, total, float(weights), float(dots));
    loss = classes > 0 ? p.loss : 0.0f;
    if (grad) {
      const float e_target = kTarget == Target::soft ? 0.0f : e[target];
      const auto value = [&](Vec v, float up, int64_t j, int lanes) {
        const Vec scaled = v * set1(p.scale * up);
        if constexpr (kTarget == Target::index) return scaled;
        return scaled - coefficient(soft, j, lanes) * set1(a_.factor);  // 0 for a single class
      };
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = c * kChunk;
        each_vec(smaller(kChunk, classes - first), [&](int64_t k, int lanes) {
          const int64_t j = first + k;
          store_part(grad + j, value(load_part(e + j, lanes), parts[c].total, j, lanes), lanes);
        });
      }
      if constexpr (kTarget != Target::soft) {
        from_float(e_target * (p.scale * parts[target / kChunk].total) - p.at_target,
                   grad + target);
      }
    }
    if (grad_soft) {
      const Vec shift = set1(top), log_total = set1(logf(total)), factor = set1(keep_ * a_.factor);
      each_vec(classes, [&](int64_t j, int lanes) {
        const Vec distance = log_total - (load_part(x + j, lanes) - shift);
        const Vec w = a_.weight ? load_part(a_.weight + j, lanes) * factor : factor;
        store_part(grad_soft + j, distance * w, lanes);
      });
    }
  }

  // n positions of a batch from `first` on, one a lane. Reads x three times, twice from L2 up to
  // 1000 classes.
  void columns(int64_t batch, int64_t first, int64_t n) const {
    const T* const x = at<T>(a_.x, batch, first);
    const S* const soft = at<S>(a_.soft, batch, first);
    T* const grad = at<T>(a_.grad, batch, first);
    S* const grad_soft = at<S>(a_.grad_soft, batch, first);
    const int64_t place = batch * a_.inner + first;
    for (int64_t i = 0; i < n; i += kLanes) {
      lane_block(x + i, soft ? soft + i : nullptr, grad ? grad + i : nullptr,
                 grad_soft ? grad_soft + i : nullptr, place + i, lanes_left(n - i));
    }
  }

  Vec column_coefficient(const S* soft, int64_t c, int lanes) const {
    Vec b = set1(smooth_);
    if constexpr (kTarget == Target::soft) {
      b = fma(load_part(soft + c * a_.soft.c, lanes), set1(keep_), b);
    }
    return a_.weight ? b * set1(a_.weight[c]) : b;
  }

  void lane_block(const T* x, const S* soft, T* grad, S* grad_soft, int64_t place,
                  int lanes) const {
    const int64_t classes = a_.classes;
    const auto score = [&](int64_t c) { return load_part(x + c * a_.x.c, lanes); };
    Vec top = set1(-kInf);
    for (int64_t c = 0; c < classes; ++c) top = max(top, score(c));
    const Vec shift = select(equal(top, set1(-kInf)), zero(), top);
    // The class of each position as a float, exact below 2^24; -1, which none is, where ignored.
    float lane[kLanes] = {}, own[kLanes] = {};
    for (int l = 0; l < lanes && kTarget != Target::soft; ++l) {
      const int64_t target = a_.target[place + l];
      const bool ignored = target == a_.ignore_index || !has_class(a_, target);
      lane[l] = ignored ? -1.0f : float(target);
      own[l] = ignored ? 0.0f : weight(target);
    }
    const Vec target = load(lane), own_weight = load(own);
    LongSum sum, weights, dots;
    Vec x_target = zero();
    for (int64_t c = 0; c < classes;) {
      Vec part = zero(), b_part = zero(), dot_part = zero();
      for (const int64_t end = smaller(classes, c + kSumVecs); c < end; ++c) {
        const Vec v = score(c) - shift;
        part = part + exp_to<float>(v);
        if constexpr (kTarget != Target::soft) {
          x_target = select(equal(target, set1(float(c))), v, x_target);
        }
        if constexpr (kTarget != Target::index) {
          const Vec each = column_coefficient(soft, c, lanes);
          dot_part = fma(each, v, dot_part), b_part = b_part + each;
        }
      }
      sum.add(part), weights.add(b_part), dots.add(dot_part);
    }
    const Vec total = select(equal(top, set1(-kInf)), set1(__builtin_nanf("")), sum.value());
    Vec b = weights.value(), dot = dots.value();
    Vec b_target = zero();
    if constexpr (kTarget != Target::soft) {
      const Vec hit = own_weight * set1(keep_);
      if constexpr (kTarget == Target::smooth) {
        b = hit + set1(smooth_ * a_.weight_sum);
        b_target = hit + own_weight * set1(smooth_);
      } else {
        b = b_target = hit;
      }
      dot = dot + hit * x_target;
    }
    float logs[kLanes];
    store(logs, total);
    for (int l = 0; l < lanes; ++l) logs[l] = logf(logs[l]);
    for (int l = lanes; l < kLanes; ++l) logs[l] = 0.0f;
    const Vec log_total = load(logs), factor = set1(a_.factor);
    const Mask ignored = less(target, zero());
    store_part(a_.loss + place, select(ignored, zero(), b * log_total - dot), lanes);
    if (grad) {
      const Vec scale = b / total * factor, at_target = b_target * factor;
      for (int64_t c = 0; c < classes; ++c) {
        Vec less_by = zero();
        if constexpr (kTarget != Target::index) {
          less_by = column_coefficient(soft, c, lanes) * factor;
        }
        if constexpr (kTarget != Target::soft) {
          less_by = select(equal(target, set1(float(c))), at_target, less_by);
        }
        const Vec g = exp_to<float>(score(c) - shift) * scale - less_by;
        store_part(grad + c * a_.grad.c, select(ignored, zero(), g), lanes);
      }
    }
    if (grad_soft) {
      for (int64_t c = 0; c < classes; ++c) {
        const Vec by = set1(keep_ * a_.factor * weight(c));
        store_part(grad_soft + c * a_.grad_soft.c, (log_total - (score(c) - shift)) * by, lanes);
      }
    }
  }
};

template <class T>
void scale(const ScaleRowsArgs& a) {
  const int64_t lines = a.columns ? a.classes : a.inner, length = a.columns ? a.inner : a.classes;
  const int64_t share = kTaskElements / (length + 1) + 1, units = a.batch * lines;
  parallel_tasks((units + share - 1) / share, [&](int64_t task) {
    for (int64_t unit = task * share; unit < smaller(units, (task + 1) * share); ++unit) {
      const int64_t n = unit / lines, line = unit % lines;
      const int64_t x_line = a.columns ? a.x.c : a.x.i, out_line = a.columns ? a.out.c : a.out.i;
      const T* const x = static_cast<const T*>(a.x.data) + n * a.x.n + line * x_line;
      T* const out = static_cast<T*>(a.out.data) + n * a.out.n + line * out_line;
      const float* const factor = a.factor + (n * a.inner + (a.columns ? 0 : line)) * a.factor_step;
      const bool each = a.columns && a.factor_step;
      each_vec(length, [&](int64_t j, int lanes) {
        const Vec f = each ? load_part(factor + j, lanes) : set1(*factor);
        store_part(out + j, load_part(x + j, lanes) * f, lanes);
      });
    }
  });
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a) {
  MMKERN_SWITCH_DTYPE(a.dtype, T, {
    if (a.target) {
      if (a.label_smoothing > 0.0f) {
        CrossEntropy<T, T, Target::smooth>(a).run();
      } else {
        CrossEntropy<T, T, Target::index>(a).run();
      }
    } else if (a.soft_dtype == a.dtype) {
      CrossEntropy<T, T, Target::soft>(a).run();
    } else {
      CrossEntropy<T, float, Target::soft>(a).run();
    }
  })
}

void scale_rows(const ScaleRowsArgs& a) {
  MMKERN_SWITCH_DTYPE(a.dtype, T, { scale<T>(a); })
}

}  // namespace mmkern::MMKERN_ISA
