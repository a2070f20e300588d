// csrc/cuda/tile/matrix.h for a host compiler: its words as calls of the emulator.
#pragma once
#include "emulate.h"

namespace mmkern {

inline void copy_async_16(smem to, const void* from, bool inside) {
  emulator::copy_async(to, from, 16, inside ? 16 : 0);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kLeft>
void copy_async_wait() {
  emulator::copy_async_wait(kLeft);
}

inline void store_shared_16(smem a, const uint32_t (&w)[4]) {
  emulator::note_write(a, 16, "store_shared_16", w);
  std::memcpy(emulator::shared_at(a), w, 16);
}
inline void load_shared_16(uint32_t (&w)[4], smem a) {
  emulator::note_read(a, 16, "load_shared_16");
  std::memcpy(w, emulator::shared_at(a), 16);
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], smem a) {
  emulator::load_matrices(r, 4, a, kTransposed);
}
template <class T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::multiply_16x8x16<T>(c, a, b);
}

inline float shuffle(float v, int lane) {
  return as_float(emulator::shuffle(0xffffffffu, as_bits(v), "shuffle", [&](int) { return lane; }));
}
inline bool any_lane(bool mine) {
  return emulator::reduce(0xffffffffu, mine, "vote",
                          [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}
inline float square_root(float x) { return std::sqrt(x); }
inline float absolute(float x) { return std::fabs(x); }

}  // namespace mmkern
