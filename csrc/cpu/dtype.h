// Storage types of tensors. Arithmetic is float32 everywhere; simd/vec.isa.h converts on load and
// store.
#pragma once

#include <cstdint>

namespace mmkern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, bf16, f16 };

// What a mask holds: booleans (true takes part) or numbers to add.
enum class MaskKind { none, boolean, f32, bf16, f16 };

}  // namespace mmkern

// Runs `...` with the type name T bound to the storage type of `dtype`.
#define MMKERN_SWITCH_DTYPE(dtype, T, ...) \
  switch (dtype) {                         \
    case mmkern::Dtype::f32: {             \
      using T = float;                     \
      __VA_ARGS__;                         \
    } break;                               \
    case mmkern::Dtype::bf16: {            \
      using T = mmkern::bf16;              \
      __VA_ARGS__;                         \
    } break;                               \
    case mmkern::Dtype::f16: {             \
      using T = mmkern::f16;               \
      __VA_ARGS__;                         \
    } break;                               \
  }
