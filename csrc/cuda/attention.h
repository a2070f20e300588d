// Arguments of the attention kernels. Strides and offsets count elements.
#pragma once

#include <cstdint>

namespace mmkern {

// The numbers are those of mmkern.reference.attention.Similarity.
enum class Similarity : int { dot, cosine, euclidean, squared_euclidean };
enum class MaskKind : int { none, boolean, f32, own };  // own: of the query's dtype, 16 bits wide

// A tensor (batch..., heads, rows, columns): any leading dims, merged into three; 0 where
// broadcast.
struct AttentionOperand {
  void* data;
  int64_t lead[3], head, row, col;
  bool aligned;  // 16-byte accesses reach every row, and a row is whole ones
};

// What turns dot products into scores.
struct ScoreArgs {
  int64_t lead1, lead2;  // batch entry (a * lead1 + b) * lead2 + c is (a, b, c) of the leading dims
  int heads, kv_heads, q_len, k_len;
  int left, right;  // keys that a query sees to both sides; q_len + k_len is all
  bool lower_right;
  Similarity similarity;
  float scale, softcap;  // softcap 0: none
  MaskKind mask_kind;
  AttentionOperand mask;
  const float *temperature, *slopes, *sinks;  // [heads], [batch][heads], [heads], or null
  const int64_t* lengths;                     // [batch] or null
  const int64_t* seed;                        // null: nothing is dropped
  int seeds;                                  // 2: seed[1] is the number of the first batch entry
  uint32_t threshold;                         // kept where a word is at least this
  float keep_scale;                           // 1 / (1 - dropout_p); 0 where nothing is kept
};

}  // namespace mmkern
