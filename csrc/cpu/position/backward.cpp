// Gradients of position and embedding tables on CPU: tensors in, kernel arguments out. The kernels
// are in backward.isa.cpp.
#include "cpu/position/backward.h"

#include <optional>
#include <vector>

#include "cpu/pages.h"
#include "cpu/position/offsets.h"

namespace mmkern {
namespace {

using OptionalTensor = std::optional<Tensor>;

// `grad` with rows that the kernels can walk.
Tensor with_rows(const Tensor& grad) {
  return has_rows(grad) ? grad : torch::stable::contiguous(grad);
}

Tensor position_table_bwd(const Tensor& grad_in, int64_t positions, int64_t offset,
                          const OptionalTensor& offsets, double dropout_p,
                          const OptionalTensor& seed) {
  const Checked given(grad_in, "grad");
  given.floating().ranked(2);
  check_offsets(offsets, offset, given, given.rank > 2);
  check_dropout(dropout_p, seed);
  check_range<int64_t>("max_length", positions, 0, INT64_MAX);
  const std::vector<int64_t> starts = read_offsets(offsets);
  const Tensor grad = with_rows(grad_in);
  Tensor out = torch::stable::new_empty(grad, {positions, grad.size(grad.dim() - 1)});
  if (out.numel() == 0) return out;
  PositionSums a{};
  a.dtype = dtype_of(grad, "grad");
  a.grad = rows_of(grad);
  a.out = out.mutable_data_ptr();
  a.positions = positions;
  a.offset = offset;
  if (offsets) a.offsets = starts.data();
  a.keep = keep_places(grad, dropout_p, seed);
  sum_positions(a);
  return out;
}

// The rows of each token, one after the other: order[starts[id]] up to order[starts[id + 1]]. Each
// id is read once: the buffer of tokens may have been filled anew since forward, or be so now. An
// id outside the vocabulary has no row of the gradient, as in torch's own embedding.
template <class Id>
void sort_tokens(const Id* ids, int64_t count, int64_t vocabulary, int64_t padding,
                 std::vector<int64_t>* starts, std::vector<int64_t>* order) {
  starts->assign(vocabulary + 2, 0);
  std::vector<int64_t> read(ids, ids + count);
  for (int64_t& id : read) {
    if (uint64_t(id) >= uint64_t(vocabulary) || id == padding) id = -1;
    if (id >= 0) ++(*starts)[id + 2];
  }
  for (int64_t id = 0; id < vocabulary; ++id) (*starts)[id + 2] += (*starts)[id + 1];
  order->resize(starts->back());
  for (int64_t i = 0; i < count; ++i) {
    if (read[i] >= 0) (*order)[(*starts)[read[i] + 1]++] = i;
  }
}

Tensor embed_tokens_bwd(const Tensor& grad_in, const Tensor& tokens, int64_t vocabulary,
                        double scale, double dropout_p, std::optional<int64_t> padding_idx,
                        const OptionalTensor& seed) {
  const Checked given(grad_in, "grad"), index(tokens, "tokens");
  if (index.type != ScalarType::Int) index.typed(ScalarType::Long);
  index.ranked(1);
  given.floating().ranked(2).shaped(index, index.rank, {given.size(1)});
  check_range<int64_t>("vocabulary", vocabulary, 0, INT64_MAX - 2);
  check_dropout(dropout_p, seed);
  check_padding(padding_idx, vocabulary);
  const Tensor grad = with_rows(grad_in), ids = torch::stable::contiguous(tokens);
  Tensor out = torch::stable::new_empty(grad, {vocabulary, grad.size(grad.dim() - 1)});
  if (out.numel() == 0) return out;
  use_large_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  TokenSums a{};
  a.dtype = dtype_of(grad, "grad");
  a.grad = rows_of(grad);
  a.out = out.mutable_data_ptr();
  a.vocabulary = vocabulary;
  a.scale = float(scale);
  a.keep = keep_places(grad, dropout_p, seed);
  std::vector<int64_t> starts, order;
  const int64_t padding = padding_idx ? *padding_idx : -1;
  if (ids.scalar_type() == ScalarType::Long) {
    sort_tokens(static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel(), vocabulary, padding,
                &starts, &order);
  } else {
    sort_tokens(static_cast<const int32_t*>(ids.const_data_ptr()), ids.numel(), vocabulary, padding,
                &starts, &order);
  }
  a.starts = starts.data();
  a.order = order.data();
  sum_tokens(a);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("position_table_bwd", TORCH_BOX(&position_table_bwd));
  m.impl("embed_tokens_bwd", TORCH_BOX(&embed_tokens_bwd));
}

}  // namespace mmkern
