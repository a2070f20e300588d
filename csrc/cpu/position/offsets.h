// Positions and tables that rows come from, as the position operators check and read them.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/check.h"

namespace mmkern {

// `offsets`, one position for each entry of x's first dim, instead of `offset`.
inline void check_offsets(const std::optional<Tensor>& offsets, int64_t offset, const Checked& x,
                          bool batched) {
  if (!offsets) return;
  const Checked o(*offsets, "offsets");
  o.typed(ScalarType::Long);
  if (!batched) refuse("offsets", "", x.name, " has no batch");
  o.shaped(x, 1);
  if (offset) refuse("offset", "expected 0 beside offsets, got ", offset);
}

// Read once, so that what is checked is what is used: another thread may write the tensor.
inline std::vector<int64_t> read_offsets(const std::optional<Tensor>& offsets) {
  if (!offsets) return {};
  const Tensor given = torch::stable::contiguous(*offsets);
  const int64_t* const first = given.const_data_ptr<int64_t>();
  return {first, first + given.numel()};
}

// Rows [start, start + length) of a table, for each start: `offset` where there are no offsets.
inline void check_starts(const std::vector<int64_t>& offsets, int64_t offset, int64_t length,
                         int64_t max_length) {
  const auto check = [&](int64_t start) {
    if (start >= 0 && start <= max_length - length) return;
    throw std::out_of_range("offset: " + std::to_string(start) + " + length " +
                            std::to_string(length) + " exceeds max_length " +
                            std::to_string(max_length) + " of the encoding table");
  };
  for (const int64_t start : offsets) check(start);
  if (offsets.empty()) check(offset);
}

inline void check_padding(const std::optional<int64_t>& padding_idx, int64_t vocabulary) {
  if (padding_idx && uint64_t(*padding_idx) >= uint64_t(vocabulary)) {
    refuse("padding_idx", *padding_idx, " is no row of a vocabulary of ", vocabulary);
  }
}

[[noreturn]] inline void refuse_token(int64_t id, int64_t place, int64_t vocabulary) {
  throw std::out_of_range("tokens: id " + std::to_string(id) + " at flat index " +
                          std::to_string(place) + " is outside the vocabulary of " +
                          std::to_string(vocabulary) + " rows of weight");
}

}  // namespace mmkern
