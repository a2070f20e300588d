// Loops that do one thing as fast as an instruction set can.
#include "cpu/ceilings.h"

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

// Independent sums in registers: two multiply-adds a cycle of 4 cycles each need 8, and 12 leave
// room for both factors in 16 registers.
constexpr int kChains = 12;

}  // namespace

void fma_loop(const ArithmeticArgs& a) {
  Vec sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = set1(float(i));
  const Vec x = set1(*a.sink), y = set1(1.0f - *a.sink);  // sums tend to 1: never subnormal
  for (int64_t round = 0; round < a.rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], x, y);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  *a.sink = reduce_add(sum[0]);
  *a.operations = 2.0 * kLanes * kChains * double(a.rounds);
}

void bf16_dot_loop(const ArithmeticArgs& a) {
#if defined(MMKERN_BF16_DOT) && defined(__aarch64__)
  float32x4_t sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = vdupq_n_f32(float(i));
  const bfloat16x8_t x = vcvtq_low_bf16_f32(vdupq_n_f32(*a.sink));
  for (int64_t round = 0; round < a.rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sum[i] = vbfdotq_f32(sum[i], x, x);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = vaddq_f32(sum[0], sum[i]);
  *a.sink = vaddvq_f32(sum[0]);
  *a.operations = 4.0 * kLanes * kChains * double(a.rounds);
#elif defined(MMKERN_BF16_DOT)
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(float(i));
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(*a.sink), _mm512_set1_ps(-*a.sink));
  for (int64_t round = 0; round < a.rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  *a.sink = _mm512_reduce_add_ps(sum[0]);
  *a.operations = 4.0 * 16 * kChains * double(a.rounds);
#else
  *a.operations = 0;
#endif
}

void copy_loop(const StreamArgs& a) {
  int64_t i = 0;
  for (; i + kLanes <= a.count; i += kLanes) store(a.to + i, load(a.from + i));
  for (; i < a.count; ++i) a.to[i] = a.from[i];
}

void read_loop(const StreamArgs& a) {
  constexpr int kSums = 8;
  Vec sum[kSums];
  for (Vec& each : sum) each = zero();
  int64_t i = 0;
  for (; i + kSums * kLanes <= a.count; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) sum[k] = sum[k] + load(a.from + i + k * kLanes);
  }
  for (int k = 1; k < kSums; ++k) sum[0] = sum[0] + sum[k];
  float rest = reduce_add(sum[0]);
  for (; i < a.count; ++i) rest += a.from[i];
  *a.sink = rest;
}

}  // namespace mmkern::MMKERN_ISA
