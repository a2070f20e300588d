// Rotary embedding on CPU: tensors in, kernel arguments out. The kernel is in rotary.isa.cpp.
#include "cpu/position/rotary.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/check.h"
#include "cpu/position/turns.h"

namespace mmkern {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Grid = std::optional<std::vector<int64_t>>;

// The rotated tensor, still to be filled, and both as rows.
Tensor prepare(Tensor* t, Rows* in, Rows* to) {
  Tensor out = empty_rows(t);
  *in = rows_of(*t);
  *to = rows_of(out);
  return out;
}

void check(const Checked& q, const OptionalTensor& positions, double base,
           const std::string& layout, int64_t rotary_dim, const Grid& grid) {
  q.floating().ranked(2);
  const int64_t length = q.size(2);
  if (positions) {
    const Checked p(*positions, "positions");
    p.typed(ScalarType::Long).ranked(1);
    p.rank == 2 && q.rank > 2 ? p.shaped({q.sizes[0], length}) : p.shaped({length});
  }
  if (!(base > 0.0 && base - base == 0.0)) {
    refuse("base", "expected a finite number above 0, got ", base);
  }
  if (layout != "half" && layout != "interleaved") {
    refuse("layout", "expected 'half' or 'interleaved', got '", layout, "'");
  }
  const int64_t unit = grid ? 4 : 2;
  check_range<int64_t>("rotary_dim", rotary_dim, 1, q.size(1));
  if (rotary_dim % unit)
    refuse("rotary_dim", "expected a multiple of ", unit, ", got ", rotary_dim);
  if (grid) {
    if (grid->size() != 2 || (*grid)[0] < 1 || (*grid)[1] < 1) {
      refuse("grid", "expected a height and a width, each at least 1");
    }
    if (!positions && product("grid", {(*grid)[0], (*grid)[1]}) != length) {
      refuse("grid", "expected height * width = length ", length, " without positions");
    }
  }
}

void check_pair(const Checked& k, const Checked& q, const OptionalTensor& positions) {
  const bool batch = q.rank > 3 || (q.rank > 2 && positions && positions->dim() == 2);
  k.typed(q.type);
  if (k.rank != q.rank || k.size(1) != q.size(1) || k.size(2) != q.size(2) ||
      (batch && k.sizes[0] != q.sizes[0])) {
    refuse("k", "expected q's rank, batch, length and dim");
  }
}

void run(RotaryArgs a, const OptionalTensor& positions, double base, const std::string& layout,
         int64_t rotary_dim, const Grid& grid, bool inverse) {
  if ((a.q.batch * a.q.heads + a.k.batch * a.k.heads) * a.q.length == 0) return;
  Tensor p;
  if (positions) {
    p = torch::stable::contiguous(*positions);
    a.positions = static_cast<const int64_t*>(p.const_data_ptr());
    a.positions_stride_b = p.dim() == 2 ? a.q.length : 0;
  }
  a.interleaved = layout == "interleaved";
  a.pairs = rotary_dim / 2;
  a.inverse = inverse;
  a.grid_width = grid ? (*grid)[1] : 0;
  std::vector<uint64_t> turns(a.pairs + kMaxPadding);
  if (grid) {
    fill_turns(turns.data(), a.pairs / 2, base, 4.0 / double(rotary_dim));
  } else {
    fill_turns(turns.data(), a.pairs, base, 2.0 / double(rotary_dim));
  }
  a.turns = turns.data();
  rotate(a);
}

Tensor rotary_fwd(Tensor q, const OptionalTensor& positions, double base, const std::string& layout,
                  int64_t rotary_dim, const Grid& grid, bool inverse) {
  check(Checked(q, "q"), positions, base, layout, rotary_dim, grid);
  RotaryArgs a{};
  a.dtype = dtype_of(q, "q");
  Tensor q_out = prepare(&q, &a.q, &a.q_out);
  run(a, positions, base, layout, rotary_dim, grid, inverse);
  return q_out;
}

std::tuple<Tensor, Tensor> rotary_qk_fwd(Tensor q, Tensor k, const OptionalTensor& positions,
                                         double base, const std::string& layout, int64_t rotary_dim,
                                         const Grid& grid, bool inverse) {
  const Checked given(q, "q");
  check(given, positions, base, layout, rotary_dim, grid);
  check_pair(Checked(k, "k"), given, positions);
  RotaryArgs a{};
  a.dtype = dtype_of(q, "q");
  Tensor q_out = prepare(&q, &a.q, &a.q_out), k_out = prepare(&k, &a.k, &a.k_out);
  run(a, positions, base, layout, rotary_dim, grid, inverse);
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_qk_fwd", TORCH_BOX(&rotary_qk_fwd));
}

}  // namespace mmkern
