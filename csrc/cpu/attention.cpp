// Attention on CPU: tensors in, kernel arguments out. The kernel is in attention.isa.cpp.
#include "cpu/attention.h"

#include <optional>
#include <tuple>

#include "cpu/tensor.h"

namespace mmkern {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Keys per split and query rows up to which keys are split: below, a (batch, head) alone would keep
// one thread busy and the others idle.
constexpr int64_t kSplitKeys = 1024, kSplitRows = 16;

// Offset of each batch, in elements: the leading dims but the head, in row-major order.
std::vector<int64_t> batch_offsets(const Tensor& t) {
  std::vector<int64_t> offsets{0};
  for (int64_t d = 0; d < t.dim() - 3; ++d) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * t.size(d));
    for (const int64_t offset : offsets) {
      for (int64_t i = 0; i < t.size(d); ++i) next.push_back(offset + i * t.stride(d));
    }
    offsets.swap(next);
  }
  return offsets;
}

// A tensor (batch..., heads, rows, columns) as the kernel sees it.
struct View {
  Tensor tensor;
  std::vector<int64_t> batch;
  explicit View(const Tensor& t) : tensor(t), batch(batch_offsets(t)) {}
  Operand operand() const {
    const int64_t d = tensor.dim();
    return {const_cast<void*>(tensor.const_data_ptr()), batch.data(), tensor.stride(d - 3),
            tensor.stride(d - 2), tensor.stride(d - 1)};
  }
};

Tensor with_unit_columns(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

const float* floats(std::optional<Tensor>& t) {
  if (!t) return nullptr;
  t = torch::stable::contiguous(*t);
  return t->const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
    double dropout_p, bool is_causal, double scale, int64_t similarity, MaybeTensor temperature,
    int64_t window_left, int64_t window_right, double softcap, MaybeTensor alibi_slopes,
    MaybeTensor key_lengths, MaybeTensor sinks, bool causal_lower_right, const MaybeTensor& seed) {
  STD_TORCH_CHECK(dropout_p == 0.0 && !seed, "dropout_p: dropout has no CPU kernel");
  const int64_t dims = query.dim();
  AttentionArgs a{};
  a.dtype = dtype_of(query, "query");
  a.batch = 1;
  std::vector<int64_t> out_sizes, lse_sizes;
  for (int64_t d = 0; d < dims - 3; ++d) {
    a.batch *= query.size(d);
    out_sizes.push_back(query.size(d));
  }
  lse_sizes = out_sizes;
  a.heads = query.size(dims - 3);
  a.kv_heads = key.size(dims - 3);
  a.q_len = query.size(dims - 2);
  a.k_len = key.size(dims - 2);
  a.head_dim = query.size(dims - 1);
  a.value_dim = value.size(dims - 1);
  // Memory (batch..., q_len, heads, value_dim), so that merging the heads afterwards copies
  // nothing.
  out_sizes.insert(out_sizes.end(), {a.q_len, a.heads, a.value_dim});
  lse_sizes.insert(lse_sizes.end(), {a.heads, a.q_len});
  Tensor out = torch::stable::empty(out_sizes, query.scalar_type());
  out = torch::stable::transpose(out, dims - 3, dims - 2);
  Tensor lse = torch::stable::empty(lse_sizes, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  const View q(with_unit_columns(query)), k(with_unit_columns(key)), v(with_unit_columns(value)),
      o(out);
  a.q = q.operand();
  a.k = k.operand();
  a.v = v.operand();
  a.out = o.operand();
  a.lse = lse.mutable_data_ptr<float>();
  std::optional<View> mask;
  if (attn_mask) {
    mask.emplace(*attn_mask);
    a.mask = mask->operand();
    a.mask_kind = mask_kind_of(*attn_mask, "attn_mask");
  }
  a.is_causal = is_causal;
  a.scale = float(scale);
  a.similarity = Similarity(similarity);
  a.temperature = floats(temperature);
  a.window_left = window_left;
  a.window_right = window_right;
  a.softcap = float(softcap);
  a.alibi_slopes = floats(alibi_slopes);
  if (key_lengths) {
    key_lengths = torch::stable::contiguous(*key_lengths);
    a.key_lengths = key_lengths->const_data_ptr<int64_t>();
  }
  a.sinks = floats(sinks);
  a.causal_lower_right = causal_lower_right;

  AttentionCall call{&a, 1, nullptr};
  const int64_t rows = a.heads / a.kv_heads * a.q_len;
  Tensor partials;
  if (rows <= kSplitRows && a.k_len > kSplitKeys) {
    call.splits = (a.k_len + kSplitKeys - 1) / kSplitKeys;
    partials = torch::stable::empty({a.batch * a.kv_heads * call.splits * rows * (a.value_dim + 2)},
                                    ScalarType::Float);
    call.partials = partials.mutable_data_ptr<float>();
  }
  attention(call);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd)); }

}  // namespace mmkern
