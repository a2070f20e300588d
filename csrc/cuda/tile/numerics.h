// Arithmetic that kernels share, in words that any compiler takes: tanh, and the random words of
// dropout. The definitions are those of mmkern/reference/philox.py and kernels/numerics.py.
#pragma once

#include "cuda/tile/matrix.h"

namespace mmkern {

// By its series below 1/4, where 1 - 2 / (1 + exp(2 x)) would cancel; both within 3 ulp.
DEVICE float hyperbolic_tangent(float x) {
  const float z = x * x;
  const float series =
      x * (1.0f + z * (-1.0f / 3 + z * (2.0f / 15 + z * (-17.0f / 315 + z * (62.0f / 2835)))));
  const float e = exp2_fast(absolute(x) * -2.8853900817779268f);  // -2 log2 e
  const float far = (1.0f - e) / (1.0f + e);
  return absolute(x) < 0.25f ? series : x < 0.0f ? -far : far;
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): four words for a counter of four.
struct PhiloxWords {
  uint32_t w[4];
};
DEVICE PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  UNROLL for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace mmkern
