// Positional encodings on CPU: tensors in, kernel arguments out. The kernels are in
// position.isa.cpp.
#include "cpu/position.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/tensor.h"
#include "cpu/turns.h"

namespace mmkern {
namespace {

using OptionalTensor = std::optional<Tensor>;

Encoding encoding_of(const std::string& name) {
  if (name == "none") return Encoding::none;
  if (name == "sinusoidal") return Encoding::sinusoidal;
  if (name == "scalar") return Encoding::scalar;
  if (name == "table") return Encoding::table;
  STD_TORCH_CHECK(name == "sincos2d", "encoding: unknown name ", name);
  return Encoding::sincos2d;
}

Tensor rows_contiguous(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) != 1 ? torch::stable::contiguous(t) : t;
}

// Frequencies of the last call on this thread and their steps, since a model calls with the same
// dim again and again: computing them takes 2 us at dim 384. 27 KB at dim 768.
struct Frequencies {
  Encoding encoding = Encoding::none;
  Isa isa = Isa::baseline;
  int64_t dim = 0;
  std::vector<uint64_t> turns;
  std::vector<float> steps;
};

void use_frequencies(PositionArgs* a) {
  thread_local Frequencies f;
  // Distinct frequencies: 10000^(-2i/dim); 10000^(-4i/dim) for each of row and column; 1/10000.
  const bool grid = a->encoding == Encoding::sincos2d, scalar = a->encoding == Encoding::scalar;
  const int64_t dim = a->out.dim;
  a->pairs = scalar ? 1 : grid ? dim / 2 : (dim + 1) / 2;
  const bool known = f.encoding == a->encoding && f.isa == current_isa && f.dim == dim;
  if (!known) {
    f.turns.assign(padded(a->pairs), 0);
    f.steps.assign(kSteps * 2 * padded(a->pairs), 0.0f);
  }
  a->turns = f.turns.data();
  a->steps = f.steps.data();
  if (known) return;
  if (scalar) {
    fill_turns(f.turns.data(), 1, 1e4, 1.0, 1);
  } else {
    fill_turns(f.turns.data(), grid ? dim / 4 : a->pairs, 1e4, (grid ? 4.0 : 2.0) / double(dim));
  }
  fill_steps(*a);
  f.encoding = a->encoding, f.isa = current_isa, f.dim = dim;
}

// Adds what both ops share to `a`, whose dtype, rows, scale and offset are set, and runs it.
void run(PositionArgs a, const OptionalTensor& table, const OptionalTensor& offsets, double scale) {
  a.scale = float(scale);
  Tensor starts, rows;
  if (offsets) {
    starts = torch::stable::contiguous(*offsets);
    a.offsets = static_cast<const int64_t*>(starts.const_data_ptr());
  }
  if (a.encoding == Encoding::table) {
    rows = rows_contiguous(*table);
    a.table = rows.const_data_ptr();
    a.table_stride = rows.stride(0);
    for (int64_t b = 0; b < (a.offsets ? a.out.batch : 1); ++b) {
      const int64_t first = a.offsets ? a.offsets[b] : a.offset, max_length = rows.size(0);
      if (first < 0 || first > max_length - a.out.length) {
        throw std::out_of_range("offset: " + std::to_string(first) + " + length " +
                                std::to_string(a.out.length) + " exceeds max_length " +
                                std::to_string(max_length) + " of the encoding table");
      }
    }
  }
  if (a.encoding != Encoding::none && a.encoding != Encoding::table) use_frequencies(&a);
  add_positions(a);
}

Tensor add_positional_encoding_fwd(const Tensor& x_in, const std::string& encoding,
                                   const OptionalTensor& table, int64_t offset,
                                   const OptionalTensor& offsets, double scale, double dropout_p,
                                   const OptionalTensor& seed) {
  PositionArgs a{};
  a.dtype = dtype_of(x_in, "x");
  a.encoding = encoding_of(encoding);
  a.offset = offset;
  const bool grid = a.encoding == Encoding::sincos2d;
  Tensor x = x_in, out = empty_rows(&x);
  if (x.numel() == 0) return out;
  a.x = rows_of(x, grid);
  a.out = rows_of(out, grid);
  a.keep = keep_places(out, dropout_p, seed);
  run(a, table, offsets, scale);
  return out;
}

Tensor embed_tokens_fwd(const Tensor& tokens, const Tensor& weight_in, const std::string& encoding,
                        const OptionalTensor& table, int64_t offset, const OptionalTensor& offsets,
                        double scale, double dropout_p, std::optional<int64_t> /*padding_idx*/,
                        const OptionalTensor& seed) {
  const Tensor ids = torch::stable::contiguous(tokens), weight = rows_contiguous(weight_in);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  Tensor out = torch::stable::new_empty(weight, shape);
  PositionArgs a{};
  a.dtype = dtype_of(weight, "weight");
  a.encoding = encoding_of(encoding);
  a.offset = offset;
  a.tokens = {ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long, ids.numel()};
  int64_t bad = -1;
  check_tokens({a.tokens, uint64_t(weight.size(0)), &bad});
  if (bad >= 0) {
    const int64_t id = a.tokens.wide ? static_cast<const int64_t*>(a.tokens.ids)[bad]
                                     : static_cast<const int32_t*>(a.tokens.ids)[bad];
    throw std::out_of_range("tokens: id " + std::to_string(id) + " at flat index " +
                            std::to_string(bad) + " is outside the vocabulary of " +
                            std::to_string(weight.size(0)) + " rows of weight");
  }
  if (out.numel() == 0) return out;
  a.out = rows_of(out);
  a.keep = keep_places(out, dropout_p, seed);
  a.weight = weight.const_data_ptr();
  a.weight_stride = weight.stride(0);
  run(a, table, offsets, scale);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("add_positional_encoding_fwd", TORCH_BOX(&add_positional_encoding_fwd));
  m.impl("embed_tokens_fwd", TORCH_BOX(&embed_tokens_fwd));
}

}  // namespace mmkern
