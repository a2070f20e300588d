// Tensors and options of an attention call as its kernels take them.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/attention/forward.h"
#include "cpu/check.h"
#include "cpu/tensor.h"

namespace mmkern {

using MaybeTensor = std::optional<Tensor>;

// A tensor (batch..., heads, rows, columns) as the kernel sees it. Dims of size 1 are broadcast to
// `lead`, the sizes before the heads, and to heads, rows and columns.
struct View {
  Tensor tensor;
  std::vector<int64_t> batch{0};  // offset of each batch, row-major, in elements
  View(const Tensor& t, const std::vector<int64_t>& lead) : tensor(t) {
    for (size_t d = 0; d < lead.size(); ++d) {
      std::vector<int64_t> next;
      next.reserve(batch.size() * lead[d]);
      for (const int64_t offset : batch) {
        for (int64_t i = 0; i < lead[d]; ++i) next.push_back(offset + i * step(int64_t(d)));
      }
      batch.swap(next);
    }
  }
  Operand operand() const {
    const int64_t d = tensor.dim();
    return {const_cast<void*>(tensor.const_data_ptr()), batch.data(), step(d - 3), step(d - 2),
            step(d - 1)};
  }

 private:
  int64_t step(int64_t d) const { return tensor.size(d) == 1 ? 0 : tensor.stride(d); }
};

inline Tensor with_unit_columns(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline const float* floats(std::optional<Tensor>& t) {
  if (!t) return nullptr;
  t = torch::stable::contiguous(*t);
  return t->const_data_ptr<float>();
}

// Raises unless an attention call is one that the kernels can run. Arguments as in the schema.
void check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                     const MaybeTensor& attn_mask, double dropout_p, double scale,
                     int64_t similarity, const MaybeTensor& temperature, int64_t window_left,
                     int64_t window_right, double softcap, const MaybeTensor& alibi_slopes,
                     const MaybeTensor& key_lengths, const MaybeTensor& sinks,
                     const MaybeTensor& seed);

// Arguments in the order of the schema; keeps alive what `args` points to.
struct AttentionInputs {
  AttentionArgs args{};
  std::vector<int64_t> lead;  // query's sizes before the heads
  MaybeTensor temperature, alibi_slopes, sinks;
  std::vector<int64_t> key_lengths;
  std::optional<View> q, k, v, mask;

  AttentionInputs(const Tensor& query, const Tensor& key, const Tensor& value,
                  const MaybeTensor& attn_mask, double dropout_p, bool is_causal, double scale,
                  int64_t similarity, const MaybeTensor& temperature_, int64_t window_left,
                  int64_t window_right, double softcap, const MaybeTensor& alibi_slopes_,
                  const MaybeTensor& key_lengths_, const MaybeTensor& sinks_,
                  bool causal_lower_right, const MaybeTensor& seed)
      : temperature(temperature_), alibi_slopes(alibi_slopes_), sinks(sinks_) {
    check_attention(query, key, value, attn_mask, dropout_p, scale, similarity, temperature_,
                    window_left, window_right, softcap, alibi_slopes_, key_lengths_, sinks_, seed);
    AttentionArgs& a = args;
    const int64_t dims = query.dim();
    a.dtype = dtype_of(query, "query");
    a.batch = 1;
    for (int64_t d = 0; d < dims - 3; ++d) {
      a.batch *= query.size(d);
      lead.push_back(query.size(d));
    }
    a.heads = query.size(dims - 3);
    a.kv_heads = key.size(dims - 3);
    a.q_len = query.size(dims - 2);
    a.k_len = key.size(dims - 2);
    a.head_dim = query.size(dims - 1);
    a.value_dim = value.size(dims - 1);
    q.emplace(with_unit_columns(query), lead);
    k.emplace(with_unit_columns(key), lead);
    v.emplace(with_unit_columns(value), lead);
    a.q = q->operand();
    a.k = k->operand();
    a.v = v->operand();
    if (attn_mask) {
      mask.emplace(*attn_mask, lead);
      a.mask = mask->operand();
      a.mask_kind = mask_kind_of(*attn_mask, "attn_mask");
    }
    a.is_causal = is_causal;
    a.scale = scale;
    a.similarity = Similarity(similarity);
    a.temperature = floats(temperature);
    a.window_left = window_left;
    a.window_right = window_right;
    a.softcap = float(softcap);
    a.alibi_slopes = floats(alibi_slopes);
    if (key_lengths_) {
      // Read once and clamped: what the tensor holds may be anything, and may change meanwhile.
      const Tensor given = torch::stable::contiguous(*key_lengths_);
      const int64_t* const length = given.const_data_ptr<int64_t>();
      for (int64_t b = 0; b < a.batch; ++b) {
        key_lengths.push_back(std::clamp<int64_t>(length[b], 0, a.k_len));
      }
      a.key_lengths = key_lengths.data();
    }
    a.sinks = floats(sinks);
    a.causal_lower_right = causal_lower_right;
    a.dropout_p = dropout_p;
    a.seed = seed ? *seed->const_data_ptr<int64_t>() : 0;
  }

  // (lead..., tail...)
  std::vector<int64_t> shape(std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> sizes = lead;
    sizes.insert(sizes.end(), tail);
    return sizes;
  }
};

}  // namespace mmkern
