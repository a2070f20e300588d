// What a kernel may touch: op files tell it as they take the addresses of tensors. Forgotten after
// each launch.
#pragma once
#include <cstddef>

namespace emulator {

void allow(const void* data, size_t bytes);

}  // namespace emulator
