// Positional encodings on CPU: tensors in, kernel arguments out. The kernels are in
// forward.isa.cpp.
#include "cpu/position/forward.h"

#include <optional>
#include <string>
#include <vector>

#include "cpu/position/offsets.h"
#include "cpu/position/turns.h"

namespace mmkern {
namespace {

using OptionalTensor = std::optional<Tensor>;

Encoding encoding_of(const std::string& name) {
  if (name == "none") return Encoding::none;
  if (name == "sinusoidal") return Encoding::sinusoidal;
  if (name == "scalar") return Encoding::scalar;
  if (name == "table") return Encoding::table;
  if (name == "sincos2d") return Encoding::sincos2d;
  refuse("encoding", "unknown name '", name, "'");
}

// What both ops ask of what is added to rows of `dim`, of x's dtype.
void check_encoding(Encoding encoding, const OptionalTensor& table, int64_t offset,
                    const OptionalTensor& offsets, ScalarType type, int64_t dim) {
  if ((encoding == Encoding::table) != bool(table)) {
    refuse("table", table ? "taken" : "needed", " by encoding 'table' alone");
  }
  if (table) {
    const Checked t(*table, "table");
    t.typed(type).ranked(2, 2).shaped({t.sizes[0], dim});
  }
  if (encoding == Encoding::sincos2d && (offset || offsets)) {
    refuse("offset", "encoding 'sincos2d' takes none");
  }
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
  const std::vector<int64_t> starts = read_offsets(offsets);
  if (offsets) a.offsets = starts.data();
  Tensor rows;
  if (a.encoding == Encoding::table) {
    rows = rows_contiguous(*table);
    a.table = rows.const_data_ptr();
    a.table_stride = rows.stride(0);
    check_starts(starts, a.offset, a.out.length, rows.size(0));
  }
  if (a.encoding != Encoding::none && a.encoding != Encoding::table) use_frequencies(&a);
  add_positions(a);
}

Tensor add_positional_encoding_fwd(const Tensor& x_in, const std::string& encoding,
                                   const OptionalTensor& table, int64_t offset,
                                   const OptionalTensor& offsets, double scale, double dropout_p,
                                   const OptionalTensor& seed) {
  PositionArgs a{};
  a.encoding = encoding_of(encoding);
  const bool grid = a.encoding == Encoding::sincos2d;
  const Checked given(x_in, "x");
  given.floating().ranked(grid ? 3 : 2);
  if (grid && given.size(1) % 4) refuse("x", "'sincos2d' needs a dim divisible by 4");
  check_encoding(a.encoding, table, offset, offsets, given.type, given.size(1));
  check_offsets(offsets, offset, given, given.rank > 2);
  check_dropout(dropout_p, seed);
  a.dtype = dtype_of(x_in, "x");
  a.offset = offset;
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
                        double scale, double dropout_p, std::optional<int64_t> padding_idx,
                        const OptionalTensor& seed) {
  PositionArgs a{};
  a.encoding = encoding_of(encoding);
  if (a.encoding == Encoding::sincos2d) refuse("encoding", "'sincos2d' is for image grids");
  const Checked given(tokens, "tokens"), embedding(weight_in, "weight");
  if (given.type != ScalarType::Int) given.typed(ScalarType::Long);
  given.ranked(1);
  embedding.floating().ranked(2, 2);
  check_encoding(a.encoding, table, offset, offsets, embedding.type, embedding.size(1));
  check_offsets(offsets, offset, given, given.rank > 1);
  check_dropout(dropout_p, seed);
  check_padding(padding_idx, embedding.sizes[0]);
  const Tensor ids = torch::stable::contiguous(tokens), weight = rows_contiguous(weight_in);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  Tensor out = torch::stable::new_empty(weight, shape);
  a.dtype = dtype_of(weight, "weight");
  a.offset = offset;
  a.vocabulary = weight.size(0);
  a.tokens = {ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long, ids.numel()};
  int64_t bad = -1;
  check_tokens({a.tokens, uint64_t(weight.size(0)), &bad});
  if (bad >= 0) {
    const int64_t id = a.tokens.wide ? static_cast<const int64_t*>(a.tokens.ids)[bad]
                                     : static_cast<const int32_t*>(a.tokens.ids)[bad];
    refuse_token(id, bad, a.vocabulary);
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
