// The formats kernels are instantiated for. Of our own, so that a kernel has one mangled name
// whichever compiler built it.
#pragma once

#include <cstdint>

namespace mmkern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace mmkern
