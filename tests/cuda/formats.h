// The 16-bit formats as C++ sees them on the host, rounded to nearest even as the hardware does.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../csrc/cuda/tile/types.h"

using mmkern::bf16;
using mmkern::f16;

namespace emulator {

template <class To, class From>
To bits_as(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}
inline float value(float x) { return x; }
inline float value(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float value(f16 x) { return float(bits_as<_Float16>(x.bits)); }

template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline bf16 rounded<bf16>(float x) {
  const uint32_t b = bits_as<uint32_t>(x);
  return {x != x ? uint16_t(0x7fff) : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
template <>
inline f16 rounded<f16>(float x) {
  return {x != x ? uint16_t(0x7fff) : bits_as<uint16_t>(_Float16(x))};
}

// Half `which` of a register that holds two.
template <class T>
float half_of(uint32_t pair, int which) {
  return value(T{uint16_t(which ? pair >> 16 : pair)});
}

}  // namespace emulator
