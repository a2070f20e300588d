// Arguments of the positional-encoding kernels: out = scale * x + encoding at each row's position,
// where x is a tensor of rows or rows of an embedding table picked by token.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace mmkern {

enum class Encoding { none, sinusoidal, scalar, table, sincos2d };

// Token ids, contiguous, `count` of them; wide: int64, else int32.
struct Tokens {
  const void* ids = nullptr;
  bool wide = true;
  int64_t count = 0;
};

// Positions computed from one another: position p = (p & ~7) + (p & 7), so that sines and cosines
// are evaluated for every eighth position and for the eight steps, and angle addition gives the
// rest. A result depends on its position alone, not on the offset or the split over threads.
constexpr int64_t kSteps = 8;

struct PositionArgs {
  Dtype dtype;
  Encoding encoding;
  // sincos2d: heads are rows of the grid and length its columns.
  Rows x, out;
  Tokens tokens;       // with weight, instead of x.data
  const void* weight;  // (vocabulary, dim)
  int64_t vocabulary;
  int64_t weight_stride;
  const void* table;  // (max_length, dim), dtype of x
  int64_t table_stride;
  int64_t offset;          // position of the first row ...
  const int64_t* offsets;  // ... or one per batch
  float scale;
  const uint64_t* turns;  // of each sine-cosine pair, per position; padded(pairs) of them
  int64_t pairs;
  KeepPlaces keep;
  float* steps;  // kSteps rows of 2 * padded(pairs), from fill_steps
};

// Room for n floats of which any part may be followed by the rest of a vector.
constexpr int64_t kMaxLanes = 16;
inline int64_t padded(int64_t n) { return (n / kMaxLanes + 2) * kMaxLanes; }

MMKERN_KERNEL(fill_steps, PositionArgs)
MMKERN_KERNEL(add_positions, PositionArgs)

struct TokenCheck {
  Tokens tokens;
  uint64_t vocabulary;
  int64_t* bad;  // index of the first token outside [0, vocabulary), or -1
};

MMKERN_KERNEL(check_tokens, TokenCheck)

}  // namespace mmkern
