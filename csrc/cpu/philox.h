// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random bits as a function of a place, so that
// dropout drops the same elements whatever the tiling, thread count or instruction set, and
// backward drops them again without having stored which. mmkern/reference/philox.py defines the
// counters. For *.isa.cpp files.
#pragma once

#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Four random words for each of kLanes blocks, whose counters of 32 bits are overwritten. A loop
// over lanes of 32 x 32 -> 64 bit products, which compilers turn into vector instructions: about 25
// a round.
struct PhiloxWords {
  uint32_t word[4][kLanes];
};
inline PhiloxWords philox(uint64_t (&c0)[kLanes], uint64_t (&c1)[kLanes], uint64_t (&c2)[kLanes],
                          uint64_t (&c3)[kLanes], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t p0 = 0xD2511F53u * c0[l], p1 = 0xCD9E8D57u * c2[l];
      c0[l] = (p1 >> 32) ^ c1[l] ^ k0;
      c1[l] = uint32_t(p1);
      c2[l] = (p0 >> 32) ^ c3[l] ^ k1;
      c3[l] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  PhiloxWords words;
  for (int l = 0; l < kLanes; ++l) {
    words.word[0][l] = uint32_t(c0[l]), words.word[1][l] = uint32_t(c1[l]);
    words.word[2][l] = uint32_t(c2[l]), words.word[3][l] = uint32_t(c3[l]);
  }
  return words;
}
// For consecutive blocks, block first + l in lane l.
inline PhiloxWords philox(uint32_t first, uint32_t row, uint32_t head, uint32_t batch,
                          uint64_t seed) {
  uint64_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int l = 0; l < kLanes; ++l)
    c0[l] = uint32_t(first + l), c1[l] = row, c2[l] = head, c3[l] = batch;
  return philox(c0, c1, c2, c3, seed);
}

// Which elements dropout keeps, and what they are multiplied by.
struct Dropout {
  uint64_t threshold;  // kept where a word is at least this; 0: everything is kept
  uint64_t seed;
  float scale;  // 1 / (1 - dropout_p); 0 where nothing is kept
  explicit Dropout(double p, int64_t key)
      : threshold(uint64_t(nearbyint(p * 4294967296.0))),
        seed(uint64_t(key)),
        scale(p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f) {}
  bool on() const { return threshold != 0; }
  float factor(uint32_t word) const { return word >= threshold ? scale : 0.0f; }
};

// factors[j] = scale or 0 for columns [0, n) of one row from column `first` on, a multiple of 4;
// writes up to 4 * kLanes - 1 floats more.
inline void dropout_factors(const Dropout& d, int64_t batch, int64_t head, int64_t row,
                            int64_t first, int64_t n, float* factors) {
  for (int64_t j = 0; j < n; j += 4 * kLanes) {
    const PhiloxWords w =
        philox(uint32_t((first + j) / 4), uint32_t(row), uint32_t(head), uint32_t(batch), d.seed);
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        factors[j + 4 * l + i] = d.factor(w.word[i][l]);
      }
    }
  }
}

}  // namespace
}  // namespace mmkern::MMKERN_ISA
