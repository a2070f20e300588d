// Attention on CPU: tensors in, kernel arguments out. The kernel is in forward.isa.cpp.
#include <tuple>

#include "cpu/attention/inputs.h"

namespace mmkern {
namespace {

// Keys per split and query rows up to which keys are split: below, a (batch, head) alone would keep
// one thread busy and the others idle.
constexpr int64_t kSplitKeys = 1024, kSplitRows = 16;

// Memory for the output in query's order of dims, as mmkern.reference.empty_output: merging the
// heads of a projection copies nothing, and a contiguous query's output is contiguous.
Tensor empty_output(const Tensor& query, const AttentionInputs& in) {
  const AttentionArgs& a = in.args;
  const int64_t dims = query.dim();
  const auto unit = [&](const Tensor& t) { return a.head_dim <= 1 || t.stride(dims - 1) == 1; };
  if (dims == 4 && a.value_dim == a.head_dim && unit(query)) {
    Tensor out = torch::stable::empty_like(query);
    if (unit(out)) return out;
  }
  if (query.stride(dims - 3) >= query.stride(dims - 2)) {
    return torch::stable::empty(in.shape({a.heads, a.q_len, a.value_dim}), query.scalar_type());
  }
  Tensor out = torch::stable::empty(in.shape({a.q_len, a.heads, a.value_dim}), query.scalar_type());
  return torch::stable::transpose(out, dims - 3, dims - 2);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key,
                                         const Tensor& value, const MaybeTensor& attn_mask,
                                         double dropout_p, bool is_causal, double scale,
                                         int64_t similarity, const MaybeTensor& temperature,
                                         int64_t window_left, int64_t window_right, double softcap,
                                         const MaybeTensor& alibi_slopes,
                                         const MaybeTensor& key_lengths, const MaybeTensor& sinks,
                                         bool causal_lower_right, const MaybeTensor& seed) {
  AttentionInputs in(query, key, value, attn_mask, dropout_p, is_causal, scale, similarity,
                     temperature, window_left, window_right, softcap, alibi_slopes, key_lengths,
                     sinks, causal_lower_right, seed);
  AttentionArgs& a = in.args;
  const Tensor out = empty_output(query, in);
  Tensor lse = torch::stable::empty(in.shape({a.heads, a.q_len}), ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const View o(out, in.lead);
  a.out = o.operand();
  a.lse = lse.mutable_data_ptr<float>();

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
