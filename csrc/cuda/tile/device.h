// The words that kernels are written in: each is one PTX instruction, or a short sequence of them.
// With -DMMKERN_EMULATE a host compiler takes tests/cuda/emulate.h in their place, which checks
// what the hardware would not.
#pragma once

#include <type_traits>

#include "cuda/tile/types.h"

// One of the errors that tests/cuda/test_seeded_errors.py must find; 0, but for that test: none.
#ifndef MMKERN_SEED
#define MMKERN_SEED 0
#endif

namespace mmkern {

constexpr int kSeed = MMKERN_SEED;
// A build with an error in it has one format only, to be compiled soon.
template <class T>
using Built = std::conditional_t<kSeed == 0, T, bf16>;

}  // namespace mmkern

#if defined(__CUDACC__)

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define UNROLL _Pragma("unroll")
#define LAUNCH(kernel, grid, threads, shared, stream, args)        \
  (kernel<<<dim3(unsigned(grid)), dim3(unsigned(threads)), shared, \
            static_cast<cudaStream_t>(stream)>>>(args),            \
   cudaPeekAtLastError() == cudaSuccess ? nullptr : cudaGetErrorString(cudaGetLastError()))

namespace mmkern {

using smem = uint32_t;  // a byte address in the block's shared memory

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void block_barrier() { __syncthreads(); }

DEVICE smem shared_base() {
  extern __shared__ __align__(1024) unsigned char mmkern_shared[];
  return static_cast<smem>(__cvta_generic_to_shared(mmkern_shared));
}
DEVICE void store_shared(smem a, float v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "f"(v) : "memory");
}
DEVICE float load_shared(smem a) {
  float v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=f"(v) : "r"(a) : "memory");
  return v;
}

// 16 bytes at once, from an address that is a multiple of 16.
DEVICE void load_16(uint32_t (&w)[4], const void* p) {
#if MMKERN_SEED == 1
  asm volatile("ld.global.v4.b32 {%1, %0, %2, %3}, [%4];"
#else
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
#endif
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "l"(p)
               : "memory");
}
DEVICE void store_16(void* p, const uint32_t (&w)[4]) {
#if MMKERN_SEED == 18
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
#elif MMKERN_SEED == 2
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %4, %3};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3])
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3])
#endif
               : "memory");
}

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DEVICE float greater(float a, float b) { return fmaxf(a, b); }  // of a number and a NaN, the number

// 2^x and log2 x by the special function unit: 2 ulp, and 2^-22 absolute near 1.
DEVICE float exp2_fast(float x) {
  float y;
#if MMKERN_SEED == 17
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#endif
  return y;
}
DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements of a 16-bit format, two in a register, the first in the low half.
template <class T>
DEVICE float wide(uint16_t bits);
template <>
DEVICE float wide<bf16>(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}
template <>
DEVICE float wide<f16>(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
template <class T>
DEVICE uint32_t narrow(float low, float high);
template <>
DEVICE uint32_t narrow<bf16>(float low, float high) {
  uint32_t pair;
#if MMKERN_SEED == 3
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}
template <>
DEVICE uint32_t narrow<f16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <class T>
DEVICE T load_bits(const T* p) {
  return *p;
}
template <class T>
DEVICE void store_bits(T* p, T v) {
  *p = v;
}

}  // namespace mmkern

#elif defined(MMKERN_EMULATE)
#include "emulate.h"
#else
#error "a kernel needs nvcc, or -DMMKERN_EMULATE"
#endif
