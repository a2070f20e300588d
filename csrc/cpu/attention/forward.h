// Arguments of the attention kernel. Strides and offsets count elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkern {

// The numbers are those of mmkern.reference.attention.Similarity.
enum class Similarity { dot, cosine, euclidean, squared_euclidean };

// One of query, key, value, mask, out: any number of leading dims gives one offset per batch, so
// that broadcast and permuted batches need no copy; within a batch, (head, row, column) strides.
struct Operand {
  void* data;
  const int64_t* batch;
  int64_t head, row, col;
};

struct AttentionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, value_dim;
  Operand q, k, v, out;  // col == 1
  float* lse;            // [batch][heads][q_len]
  MaskKind mask_kind;
  Operand mask;
  bool is_causal;
  double scale;
  Similarity similarity;
  const float* temperature;           // [heads] or null
  int64_t window_left, window_right;  // -1: unbounded
  float softcap;                      // 0: off
  const float* alibi_slopes;          // [batch][heads] or null
  const int64_t* key_lengths;         // [batch], in [0, k_len], or null
  const float* sinks;                 // [heads] or null
  bool causal_lower_right;
  double dropout_p;
  int64_t seed;
};

// Keys are split for parallelism where there are few query rows (rows = heads / kv_heads * q_len).
// The split depends on the shape alone, so results do not change with the number of threads.
// `partials`: [batch * kv_heads][splits][rows][value_dim + 2] floats, unused where splits == 1.
struct AttentionCall {
  const AttentionArgs* args;
  int64_t splits;
  float* partials;
};

constexpr int64_t kDirectRows = 12;  // so few query rows that share a key head read keys as stored

MMKERN_KERNEL(attention, AttentionCall)

}  // namespace mmkern
