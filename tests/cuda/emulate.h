// csrc/cuda/tile/device.h for a host compiler: its words as calls of the emulator, and a launch
// that runs a kernel either as g++ compiled it or, given the PTX that nvcc wrote of the same
// source, from that.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/tile/types.h"
#include "scheduler.h"

#define DEVICE inline
#define KERNEL(threads) void
#define UNROLL
#define LAUNCH(kernel, grid, threads, shared, stream, args)                            \
  (static_cast<void>(stream),                                                          \
   emulator::launch(reinterpret_cast<void*>(+kernel), int(grid), int(threads), shared, \
                    reinterpret_cast<const uint8_t*>(&args), [=] { (kernel)(args); }))

namespace emulator {

// Null, or what went wrong. `arguments`: the bytes of the kernel's one parameter.
const char* launch(void* kernel, int grid, int threads, int shared, const uint8_t* arguments,
                   const std::function<void()>& body);

}  // namespace emulator

namespace mmkern {

using emulator::smem;

inline int thread_index() { return emulator::self().id; }
inline int block_index() { return emulator::current()->index[0]; }
inline int block_count() { return emulator::current()->launch.grid[0]; }
inline void block_barrier() { emulator::block_barrier(); }
inline smem shared_base() { return 0; }

inline void store_shared(smem a, float v) {
  emulator::note_write(a, 4, "store_shared", &v);
  std::memcpy(emulator::shared_at(a), &v, 4);
}
inline float load_shared(smem a) {
  emulator::note_read(a, 4, "load_shared");
  float v;
  std::memcpy(&v, emulator::shared_at(a), 4);
  return v;
}
inline void load_16(uint32_t (&w)[4], const void* p) {
  emulator::note_global(p, 16, "load_16");
  std::memcpy(w, p, 16);
}
inline void store_16(void* p, const uint32_t (&w)[4]) {
  emulator::note_global(p, 16, "store_16", w);
  std::memcpy(p, w, 16);
}
template <class T>
T load_bits(const T* p) {
  emulator::note_global(p, sizeof(T), "load");
  return *p;
}
template <class T>
void store_bits(T* p, T v) {
  emulator::note_global(p, sizeof(T), "store", &v);
  *p = v;
}

inline float as_float(uint32_t bits) { return emulator::bits_as<float>(bits); }
inline uint32_t as_bits(float x) { return emulator::bits_as<uint32_t>(x); }
inline float shuffle_xor(float v, int lanes) {
  return as_float(emulator::shuffle_xor(as_bits(v), lanes));
}
inline float greater(float a, float b) { return std::fmax(a, b); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

template <class T>
float wide(uint16_t bits) {
  return emulator::value(T{bits});
}
template <class T>
uint32_t narrow(float low, float high) {
  return emulator::rounded<T>(low).bits | uint32_t(emulator::rounded<T>(high).bits) << 16;
}

}  // namespace mmkern
