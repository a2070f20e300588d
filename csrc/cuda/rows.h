// Tensors as rows to be reduced: three outer dims, an inner one, and the width. Strides count
// elements.
#pragma once

#include <cstdint>

namespace mmkern {

struct RowOperand {
  void* data;
  int64_t stride[4];  // of the outer dims and the inner one
  int64_t column;     // of the width
};
struct RowShape {
  int64_t rows, n1, n2, inner, width;
};

}  // namespace mmkern
