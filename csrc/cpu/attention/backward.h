// Arguments of the attention backward kernel.
#pragma once

#include "cpu/attention/forward.h"

namespace mmkern {

// Sums over the keys of a row, which become gradients of what a row, head or batch has once.
enum RowSum { kSumWeights, kSumTemperature, kSumSlope, kSumMask, kRowSums };

// What backward finds of a row again where its log-sum-exp does not tell: whether it did (1, or 0),
// the maximum of its scores as they are kept, what 2^(score - that) is multiplied by, and the
// weight of its sink.
enum RowStat { kStatFound, kStatMax, kStatInverse, kStatSink, kRowStats };

// Gradients with a null `data` (or a null pointer) are not wanted.
struct AttentionBackwardArgs {
  AttentionArgs forward;  // with its result: out and lse
  Operand grad_out;
  const float* grad_lse;  // [batch][heads][q_len] or null
  Operand grad_q, grad_k, grad_v;
  // Gradient of a mask that has rows and columns of its own: float32, zeros to start from; float64
  // where several units share an element: unit u (batch * kv_heads + key head) is the
  // `mask_place[u]`th to add to the part of the mask that is numbered mask_part[u].
  Operand grad_mask;
  const int32_t *mask_part, *mask_place;
  bool mask_shared;
  float* column_sums;     // [batch][heads][k_len]: gradients of scores summed over the rows; zeros
  double* row_sums;       // [units][rows][kRowSums]: zeros, or null where none are wanted
  float* grad_sink_rows;  // [batch][heads][q_len]: what each row adds to the gradient of its sink
  bool temperature, slopes, mask_rows;  // which row sums are wanted
  float* stats;        // [batch][heads][q_len][kRowStats]: zeros, or null where no row needs them
  bool all_stats;      // every row does
  float* delta;        // [batch][heads][q_len]: scratch; null where one block has all keys
  float* grad_q_sums;  // [units][rows][head_dim, rounded up]: scratch, unless key_blocks is 1; of
                       // double where there are more than 64
  int64_t query_blocks, key_blocks, block_keys;  // block_keys: a multiple of 64
  int32_t* query_turns;  // [units][query_blocks]: next key block to add to grad_q; zeros
  int32_t* mask_turns;   // [parts][key_blocks][query_blocks]: next place to add; zeros
};

constexpr int64_t kBackwardRows = 96;  // query rows of a block
// Weights are exp(score - lse) up to this |lse|, whose rounding they share: 4e-6. A larger one may
// not even hold the logarithm of the number of keys.
constexpr float kFarLse = 128.0f;

MMKERN_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace mmkern
