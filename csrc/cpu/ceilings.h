// The most this machine does: what a kernel's speed is held against. Measured with the instruction
// set in use, on torch's threads, each for about `seconds` of wall clock; the best round counts.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mmkern {

// 10^9 float32 operations a second, a multiply-add counting as two.
double fma_gflops(double seconds);

// 10^9 operations a second of bf16 pairs into float32 sums; 0 where the set has no such
// instruction.
double bf16_dot_gflops(double seconds);

// 10^9 bytes moved a second: copying `bytes` (each read once and written once, so counted twice).
double copy_gbs(int64_t bytes, double seconds);

// 10^9 bytes read a second, over and over from `bytes`.
double read_gbs(int64_t bytes, double seconds);

// The loops, in ceilings.isa.cpp. Each leaves a value in `sink`, so that nothing is optimised away.
struct ArithmeticArgs {
  int64_t rounds;
  double* operations;  // out: how many it did
  float* sink;
};
struct StreamArgs {
  const float* from;
  float* to;  // copy only
  int64_t count;
  float* sink;  // read only
};

MMKERN_KERNEL(fma_loop, ArithmeticArgs)
MMKERN_KERNEL(bf16_dot_loop, ArithmeticArgs)
MMKERN_KERNEL(copy_loop, StreamArgs)
MMKERN_KERNEL(read_loop, StreamArgs)

}  // namespace mmkern
