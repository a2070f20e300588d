// Stores that go around the caches, for outputs that would not stay in them anyway: a line that is
// written whole need not be read first, so scale * x + row moves 8 bytes an element instead of 12.
#pragma once

#include "cpu/simd/vec.isa.h"

namespace mmkern::MMKERN_ISA {

// Outputs of at least this many bytes are streamed: what half of a 32 MB cache holds beside its
// input.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// p is aligned to a whole vector of T.
template <class T>
inline void stream(T* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, narrow(x, T{}));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, narrow(x, T{}));
#else
  store(p, x);
#endif
}
template <>
inline void stream<float>(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x.v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x.v);
#else
  store(p, x);
#endif
}

// After the last stream of a task, before another thread may read what it wrote.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
inline bool stream_aligned(const T* p) {
  return uintptr_t(p) % (kLanes * sizeof(T)) == 0;
}

// Writes v at p by a stream or a plain store.
template <bool kStream, class T>
inline void put(T* p, Vec v) {
  if constexpr (kStream) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

}  // namespace mmkern::MMKERN_ISA
