// What the host decides about a launch: pure functions of shapes, tested on the CPU
// (tests/cuda/test_plan.py).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cuda/rows.h"

namespace mmkern {

enum class Dtype { f32, bf16, f16 };
inline int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Blocks of one launch: what CUDA allows in x. Kernels step over the grid, so that more rows than
// that are no limit.
constexpr int64_t kMostBlocks = 2147483647;

// Which instance of a row kernel runs, and how often.
struct RowPlan {
  int threads;  // for one row; a block has at least 128
  int per;  // elements of a row that one thread holds; 0: the row does not stay on chip and is read
            // twice
  int block;  // threads of a block
  int64_t grid;
  int shared;  // bytes
};

// The narrowest instance that holds a row of `width` whole, in rising order; below 128 threads a
// row, a block has several. 16 elements of two operands and their addresses are what the 64
// registers of a thread of a full block hold; 32 of one spill on sm_100.
struct RowInstance {
  int threads, per;
};
constexpr std::array<RowInstance, 5> kInstances = {
    {{32, 8}, {32, 16}, {128, 16}, {512, 16}, {1024, 16}}};
constexpr int kStreaming = 1024;  // threads of a row that does not stay

inline RowPlan plan_rows(int64_t rows, int64_t width) {
  RowPlan plan{kStreaming, 0, kStreaming, 0, 0};
  for (const RowInstance& row : kInstances) {
    if (width > int64_t(row.threads) * row.per) continue;
    plan.threads = row.threads, plan.per = row.per, plan.block = std::max(row.threads, 128);
    break;
  }
  const int64_t together = plan.block / plan.threads;
  plan.grid = std::min((rows + together - 1) / together, kMostBlocks);
  plan.shared = plan.threads > 32 ? 256 : 0;  // two scratches of a reduction between 32 warps
  return plan;
}

// Merges the dims of tensors of one shape, all but `dim`, into at most four; false where their
// strides need more. strides[t][d]: of tensor t. steps[t]: of its three outer dims and the inner
// one.
inline bool collapse(const std::vector<int64_t>& sizes,
                     const std::vector<std::vector<int64_t>>& strides, int64_t dim, RowShape* shape,
                     std::vector<std::array<int64_t, 4>>* steps) {
  struct Group {
    int64_t size;
    std::vector<int64_t> step;
  };
  std::vector<Group> groups;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (int64_t(d) == dim || sizes[d] == 1) continue;
    std::vector<int64_t> step;
    for (auto& of : strides) step.push_back(of[d]);
    bool merges = !groups.empty();
    for (size_t t = 0; merges && t < step.size(); ++t)
      merges = groups.back().step[t] == step[t] * sizes[d];
    if (merges)
      groups.back() = {groups.back().size * sizes[d], step};
    else
      groups.push_back({sizes[d], step});
  }
  if (groups.size() > 4) return false;
  while (groups.size() < 4)
    groups.insert(groups.begin(), {1, std::vector<int64_t>(strides.size(), 0)});
  *shape = {groups[0].size * groups[1].size * groups[2].size * groups[3].size, groups[1].size,
            groups[2].size, groups[3].size, sizes[size_t(dim)]};
  steps->assign(strides.size(), {});
  for (size_t t = 0; t < strides.size(); ++t)
    for (int g = 0; g < 4; ++g) (*steps)[t][g] = groups[g].step[t];
  return true;
}

// Whether 16-byte accesses reach every row of an operand.
inline bool aligned_rows(const RowOperand& o, int64_t width, int size) {
  bool aligned = (o.column == 1 || width == 1) && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
  for (int64_t step : o.stride) aligned = aligned && step * size % 16 == 0;
  return aligned;
}

}  // namespace mmkern
