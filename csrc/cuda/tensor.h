// What op files share when they turn tensors into kernel arguments: dtypes, rows, the stream,
// errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "cuda/plan.h"

#if defined(MMKERN_EMULATE)
#include "buffers.h"
#define MMKERN_DEVICE_KEY CPU
#else
// In libtorch_cuda alone. Weak, so that the library loads beside a torch without CUDA, where its
// names can be checked.
extern "C" {
#pragma weak aoti_torch_get_current_cuda_stream
}
#define MMKERN_DEVICE_KEY CUDA
#endif

namespace mmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": the CUDA kernels take float32, bfloat16 and float16");
      return Dtype::f32;
  }
}

// Where an operand's elements are; every tensor that a kernel touches passes here.
inline void* data_of(const Tensor& t) {
  void* data = const_cast<void*>(t.const_data_ptr());
#if defined(MMKERN_EMULATE)
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  if (t.numel()) emulator::allow(data, size_t(last + 1) * t.element_size());
#endif
  return data;
}

// The device of `t` made current, and its stream; an error names the op.
class Stream {
 public:
#if defined(MMKERN_EMULATE)
  explicit Stream(const Tensor&) {}
  void* get() const { return nullptr; }
#else
  explicit Stream(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline void check_launch(const char* error, const char* op, const RowPlan& plan) {
  STD_TORCH_CHECK(error == nullptr, op, ": the launch of ", plan.grid, " blocks of ", plan.block,
                  " threads failed: ", error ? error : "");
}

// Rows of tensors of one shape along `dim`, in `operands`; copies where no four strides tell their
// rows. `out`, the last, is contiguous or has been found to have such strides.
inline RowShape rows_of(std::initializer_list<Tensor*> tensors, int64_t dim,
                        std::initializer_list<RowOperand*> operands) {
  std::vector<std::vector<int64_t>> strides;
  std::vector<std::array<int64_t, 4>> steps;
  std::vector<int64_t> sizes;
  RowShape shape{};
  for (int attempt = 0; attempt < 2; ++attempt) {
    strides.clear();
    for (Tensor* t : tensors) {
      const auto size = t->sizes(), step = t->strides();
      sizes.assign(size.begin(), size.end());
      strides.emplace_back(step.begin(), step.end());
    }
    if (collapse(sizes, strides, dim, &shape, &steps)) break;
    STD_TORCH_CHECK(attempt == 0, "rows: contiguous tensors do not collapse");
    for (Tensor* t : tensors) *t = torch::stable::contiguous(*t);
  }
  size_t n = 0;
  auto tensor = tensors.begin();
  for (RowOperand* o : operands) {
    o->data = data_of(**tensor++);
    std::copy(steps[n].begin(), steps[n].end(), o->stride);
    o->column = strides[n++][size_t(dim)];
  }
  return shape;
}

}  // namespace mmkern
