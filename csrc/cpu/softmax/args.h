// Arguments of the softmax kernels. Strides count elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkern {

enum class SoftmaxKind { softmax, log_softmax, masked };

// An input or the output: where a row starts is found by the strides of the outer dims, where an
// element of it lies by `col`. `inner` is the stride of the last dim where that is not the one
// summed over. No `outer`: there is no such operand.
struct SoftmaxOperand {
  void* data;
  const int64_t* outer;
  int64_t col, inner;
};

struct SoftmaxArgs {
  SoftmaxKind kind;
  Dtype dtype;  // of x, grad and out
  MaskKind mask_kind, bias_kind;
  SoftmaxOperand x, mask, bias, out;
  int outer_dims;
  const int64_t* outer_sizes;
  int64_t cols;   // elements summed over
  int64_t inner;  // neighbouring rows worked on side by side; 1 where the last dim is summed over
  float scale;    // masked only: scores are scale * x + bias + mask
  bool fresh;  // out was allocated for this call: its first write brings its pages into the cache

  // Dropout, of masked only: element (batch, head, row, column) of x is at offset
  // ((batch * heads + head) * rows + row) * columns + column of `out`, which is then contiguous.
  double dropout_p;
  int64_t seed, heads, rows, columns;

  // Backward. x is the forward's output, or its input, from which the weights before dropout are
  // computed again. out is the gradient of the input; out.data may be null.
  bool from_input;
  SoftmaxOperand grad;
  SoftmaxOperand term;  // gradient of mask or bias: strides of 0 along dims that it sums over
  MaskKind term_kind;   // f32, bf16 or f16; none: no such gradient
  // Rows with the same place in `term` are `shared`, and the outer dims that count them come first.
  // At most part_rows of them are added one after the other; where there are more, such parts wait
  // in `parts` (parts, rows of term, cols).
  int64_t shared, part_rows;
  float* parts;
};

MMKERN_KERNEL(softmax, SoftmaxArgs)
MMKERN_KERNEL(softmax_backward, SoftmaxArgs)

}  // namespace mmkern
