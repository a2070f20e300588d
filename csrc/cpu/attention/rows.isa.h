// Query rows as the attention kernels walk them, and where their elements lie. The rows of all
// query heads that share a key head are one sequence of rows, those of one position side by side,
// so that a block of rows sees the narrowest range of keys.
#pragma once

#include "cpu/attention/forward.h"
#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Factors that all scores share are rounded once: their error does not average out.
constexpr double kLog2eExact = 1.4426950408889634, kLn2Exact = 0.6931471805599453;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Bump allocation inside one thread's scratch; called once with null to measure.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

// A query row beside its elements. Keys [lo, hi) are visible, as far as the mask allows.
struct Row {
  int64_t batch, head, index;  // which query: index is its position in the sequence
  int64_t lo, hi;
  double factor;  // score = similarity * factor, before cap, biases and mask
  // Scores are kept without the factor where nothing but softmax follows it: `scale` is what they
  // lack, 1 elsewhere, and `unit` brings what is kept to units of log2.
  float scale, unit;
  bool scaled;       // whether scores are kept with their factor
  float norm;        // cosine: 1 / length of the query; distances: its squared length
  float slope;       // ALiBi
  int64_t position;  // of the query on the key axis
  int64_t mask;      // first element of its row of the mask
  float m;           // running maximum, of scores as they are kept
  double l;          // running sum
  float far_m;       // the maximum that `far` sums of values are relative to
};

template <class T>
float squared_norm(const T* x, int64_t n) {
  Vec sum = zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec v = load_n(x + d, n - d < kLanes ? int(n - d) : kLanes);
    sum = fma(v, v, sum);
  }
  return reduce_add(sum);
}

// 1 / max(|x|, 1e-12), by way of the largest element where the squares overflow or underflow.
template <class T>
float reciprocal_norm(const T* x, int64_t n) {
  float square = squared_norm(x, n);
  float top = 1.0f;
  if (!(square > 1e-30f && square < 1e38f)) {
    top = 0.0f;
    for (int64_t d = 0; d < n; ++d) {
      const float v = fabsf(to_float(x[d]));
      if (!(v <= top)) top = v;
    }
    if (top == 0.0f || !(top < kInf)) return top == 0.0f ? 1e12f : top * 0.0f;
    square = 0.0f;
    for (int64_t d = 0; d < n; ++d) square += (to_float(x[d]) / top) * (to_float(x[d]) / top);
  }
  const float norm = sqrtf(square);
  return norm < 1e-12f / top ? 1e12f : 1.0f / norm / top;
}

// Sums over blocks are float32 for so many blocks; what these add up to is double.
constexpr int64_t kFoldedBlocks = 64;

// far += near, which starts again; `first`: far holds nothing yet.
inline void fold(double* far, float* near, int64_t n, bool first) {
  for (int64_t i = 0; i < n; ++i) far[i] = first ? near[i] : far[i] + near[i];
  memset(near, 0, n * sizeof(float));
}

// The elements of a row of `o`, which has the query's batch, heads and rows.
template <class T>
T* row_of(const Operand& o, const Row& r) {
  return static_cast<T*>(o.data) + o.batch[r.batch] + r.head * o.head + r.index * o.row;
}
// The first row of a key head of `o`, which has the keys' batch and heads.
template <class T>
T* head_of(const Operand& o, int64_t batch, int64_t kv_head) {
  return static_cast<T*>(o.data) + o.batch[batch] + kv_head * o.head;
}
// Where the value of a row lies in [batch][heads][q_len].
inline int64_t flat_index(const AttentionArgs& a, const Row& r) {
  return (r.batch * a.heads + r.head) * a.q_len + r.index;
}

// Row `flat` of the heads that share kv_head.
template <class T>
Row make_row(const AttentionArgs& a, int64_t batch, int64_t kv_head, int64_t flat) {
  const int64_t group = a.heads / a.kv_heads;
  Row r;
  r.batch = batch;
  r.head = kv_head * group + flat % group;
  r.index = flat / group;
  const int64_t length = a.key_lengths ? a.key_lengths[batch] : a.k_len;
  r.position = r.index + (a.causal_lower_right ? length - a.q_len : 0);
  r.lo = a.window_left < 0 ? 0 : larger(0, r.position - a.window_left);
  r.hi = length;
  if (a.is_causal) r.hi = smaller(r.hi, r.position + 1);
  if (a.window_right >= 0) r.hi = smaller(r.hi, r.position + a.window_right + 1);
  r.hi = larger(r.hi, 0);
  r.lo = smaller(r.lo, r.hi);
  r.factor = a.scale * (a.temperature ? double(a.temperature[r.head]) : 1.0);
  r.unit = float(r.factor * kLog2eExact);
  r.scaled = a.mask_kind != MaskKind::none || a.softcap != 0.0f || a.alibi_slopes ||
             !(r.unit > 0.0f && r.unit < kInf);
  r.scale = r.scaled ? 1.0f : float(r.factor);
  if (r.scaled) r.unit = kLog2e;
  r.slope = a.alibi_slopes ? a.alibi_slopes[batch * a.heads + r.head] : 0.0f;
  r.norm = 0.0f;
  const T* q = row_of<const T>(a.q, r);
  if (a.similarity == Similarity::cosine) r.norm = reciprocal_norm(q, a.head_dim);
  if (a.similarity >= Similarity::euclidean) r.norm = squared_norm(q, a.head_dim);
  r.mask = a.mask_kind == MaskKind::none
               ? 0
               : a.mask.batch[batch] + r.head * a.mask.head + r.index * a.mask.row;
  r.m = r.far_m = -kInf;
  r.l = 0.0;
  return r;
}

// Norms of keys [0, count): 1 / length for cosine, squared length for distances.
template <class T>
void measure_keys(const AttentionArgs& a, const T* k, int64_t count, float* norms) {
  if (a.similarity == Similarity::dot) return;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = k + i * a.k.row;
    norms[i] = a.similarity == Similarity::cosine ? reciprocal_norm(row, a.head_dim)
                                                  : squared_norm(row, a.head_dim);
  }
}

// The part [lo, hi) of a block of `count` keys from j on that some of n rows see, from a whole
// vector on.
struct Range {
  int64_t lo, hi;
};
inline Range visible_range(const Row* rows, int64_t n, int64_t j, int64_t count) {
  Range range{count, 0};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t lo = larger(rows[i].lo - j, 0), hi = smaller(rows[i].hi - j, count);
    if (lo < hi) range = {smaller(range.lo, lo), larger(range.hi, hi)};
  }
  range.lo = range.lo / kLanes * kLanes;
  return range;
}

// Asks for rows that will be read soon, into L1 (kNear) or L2.
template <bool kNear, class T>
void fetch_rows(const T* rows, int64_t row, int64_t n, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(rows + i * row + d, 0, kNear ? 3 : 2);
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
