// Rotary embedding on CPU: tensors in, kernel arguments out. The kernel is in rotary.isa.cpp.
#include "cpu/rotary.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/tensor.h"
#include "cpu/turns.h"

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
  RotaryArgs a{};
  a.dtype = dtype_of(q, "q");
  Tensor q_out = prepare(&q, &a.q, &a.q_out);
  run(a, positions, base, layout, rotary_dim, grid, inverse);
  return q_out;
}

std::tuple<Tensor, Tensor> rotary_qk_fwd(Tensor q, Tensor k, const OptionalTensor& positions,
                                         double base, const std::string& layout, int64_t rotary_dim,
                                         const Grid& grid, bool inverse) {
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
