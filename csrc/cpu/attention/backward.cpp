// Attention backward on CPU: tensors in, kernel arguments out, and the sums over batches, heads and
// rows that are too small for a kernel. The kernel is in backward.isa.cpp.
#include "cpu/attention/backward.h"

#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "cpu/attention/inputs.h"

namespace mmkern {
namespace {

// Which gradients are wanted: bits of `wanted`, in the order of the results.
enum Wanted { kQuery, kKey, kValue, kMask, kTemperature, kSlopes, kSinks };

// What backward asks beyond the forward's arguments, which AttentionInputs has found to be right.
void check_gradients(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& out,
                     const Tensor& lse, const AttentionInputs& in, const Tensor& query,
                     const MaybeTensor& attn_mask, const MaybeTensor& temperature,
                     const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, int64_t wanted) {
  const Checked q(query, "query");
  const int64_t rows = q.rank - 1;
  Checked(out, "out").typed(q.type).shaped(q, rows, {in.args.value_dim});
  Checked(grad_out, "grad_out").typed(q.type).shaped(q, rows, {in.args.value_dim});
  Checked(lse, "lse").typed(ScalarType::Float).shaped(q, rows);
  if (grad_lse) Checked(*grad_lse, "grad_lse").typed(ScalarType::Float).shaped(q, rows);
  int64_t possible = 1 << kQuery | 1 << kKey | 1 << kValue;
  if (attn_mask && attn_mask->scalar_type() != ScalarType::Bool) possible |= 1 << kMask;
  if (temperature) possible |= 1 << kTemperature;
  if (alibi_slopes) possible |= 1 << kSlopes;
  if (sinks) possible |= 1 << kSinks;
  check_wanted(wanted, possible);
  // Parts of a mask, and key blocks, are counted in 32 bits.
  const int64_t units = product("key", {in.args.batch, in.args.kv_heads});
  if (units > INT32_MAX || in.args.k_len / 64 >= INT32_MAX) {
    refuse("key", units, " heads of ", in.args.k_len, " keys are too many to be counted");
  }
}

int64_t block_keys(int64_t widest_dim) {
  return widest_dim <= 64 ? 256 : widest_dim <= 128 ? 128 : 64;  // blocks of k and v stay in L2
}

// A gradient of t's shape, and t's strides where they leave no holes.
Tensor like(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  Tensor out = torch::stable::empty_like(t);
  if (t.size(last) <= 1 || out.stride(last) == 1) return out;
  return torch::stable::empty(t.sizes(), t.scalar_type());
}

template <class T>
T* zeros(Tensor& holder, std::initializer_list<int64_t> sizes, ScalarType type) {
  holder = torch::stable::empty(std::vector<int64_t>(sizes), type);
  torch::stable::zero_(holder);
  return static_cast<T*>(holder.mutable_data_ptr());
}

// Adds value(batch, head, i) to the element of `to` (float32, contiguous) that stands for it, in
// float64 and in a fixed order; `to` sees the batch and heads as `view`, and i by `step`.
template <class F>
void reduce(const AttentionArgs& a, const View& view, int64_t step, int64_t count, const F& value) {
  const Operand to = view.operand();
  std::vector<double> totals(view.tensor.numel(), 0.0);
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        totals[to.batch[b] + h * to.head + i * step] += value(b, h, i);
      }
    }
  }
  for (size_t i = 0; i < totals.size(); ++i) static_cast<float*>(to.data)[i] = float(totals[i]);
}

// Whether a row is there whose log-sum-exp does not tell the sum of its exponentials.
bool any_far(const float* lse, int64_t rows) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  int64_t far = 0;
  for (int64_t i = 0; i < rows; ++i) far += !(std::fabs(lse[i]) < kFarLse) & (lse[i] != kHidden);
  return far != 0;
}

// Whether forward may have read keys as stored, whose dot products differ from backward's in their
// last bits, and the scores are what a mask or ALiBi has left of larger ones.
bool other_bits(const AttentionArgs& a) {
  return a.heads / a.kv_heads * a.q_len <= kDirectRows && a.similarity <= Similarity::cosine &&
         (a.mask_kind > MaskKind::boolean || a.alibi_slopes);
}

// Units in the order in which they add to the part of the mask that they share, if any do.
struct MaskOrder {
  std::vector<int32_t> part, place;
  int32_t parts = 0;
  bool shared = false;
  MaskOrder(const AttentionArgs& a, const Operand& mask) {
    std::map<int64_t, int32_t> numbers;
    std::vector<int32_t> added;
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const auto [at, fresh] = numbers.try_emplace(mask.batch[b] + h * group * mask.head, parts);
        if (fresh) ++parts, added.push_back(0);
        part.push_back(at->second);
        place.push_back(added[at->second]++);
        shared |= !fresh;
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
    double dropout_p, bool is_causal, double scale, int64_t similarity,
    const MaybeTensor& temperature, int64_t window_left, int64_t window_right, double softcap,
    const MaybeTensor& alibi_slopes, const MaybeTensor& key_lengths, const MaybeTensor& sinks,
    bool causal_lower_right, const MaybeTensor& seed, int64_t wanted) {
  AttentionInputs in(query, key, value, attn_mask, dropout_p, is_causal, scale, similarity,
                     temperature, window_left, window_right, softcap, alibi_slopes, key_lengths,
                     sinks, causal_lower_right, seed);
  check_gradients(grad_out, grad_lse, out, lse, in, query, attn_mask, temperature, alibi_slopes,
                  sinks, wanted);
  AttentionBackwardArgs g{};
  AttentionArgs& a = g.forward;
  a = in.args;
  const auto wants = [wanted](Wanted which) { return (wanted >> which & 1) != 0; };
  const auto gradient = [&](Wanted which, const Tensor& t) {
    return wants(which) ? like(t) : torch::stable::empty({0}, query.scalar_type());
  };
  Tensor grad_q = gradient(kQuery, in.q->tensor), grad_k = gradient(kKey, in.k->tensor);
  Tensor grad_v = gradient(kValue, in.v->tensor);
  // The small ones are summed in float32, whatever the mask's dtype.
  const auto small = [&](Wanted which, const MaybeTensor& t) {
    return wants(which) ? torch::stable::empty(t->sizes(), ScalarType::Float)
                        : torch::stable::empty({0}, query.scalar_type());
  };
  Tensor grad_mask = small(kMask, attn_mask), grad_temperature = small(kTemperature, temperature);
  Tensor grad_slopes = small(kSlopes, alibi_slopes), grad_sinks = small(kSinks, sinks);
  for (Tensor* t : {&grad_q, &grad_mask, &grad_temperature, &grad_slopes, &grad_sinks}) {
    if (t->numel()) torch::stable::zero_(*t);  // for rows that see nothing
  }
  const auto result = [&]() {
    if (wants(kMask) && attn_mask->scalar_type() != ScalarType::Float) {
      grad_mask = torch::stable::to(grad_mask, attn_mask->scalar_type());
    }
    return std::make_tuple(grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_slopes,
                           grad_sinks);
  };
  const int64_t rows_all = a.batch * a.heads * a.q_len;
  if (rows_all == 0) {
    if (grad_k.numel()) torch::stable::zero_(grad_k);
    if (grad_v.numel()) torch::stable::zero_(grad_v);
    return result();
  }

  const Tensor grad = with_unit_columns(grad_out), forward = with_unit_columns(out);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  const View grad_view(grad, in.lead), out_view(forward, in.lead);
  const View q_view(wants(kQuery) ? grad_q : in.q->tensor, in.lead);
  const View k_view(wants(kKey) ? grad_k : in.k->tensor, in.lead);
  const View v_view(wants(kValue) ? grad_v : in.v->tensor, in.lead);
  g.grad_out = grad_view.operand();
  a.out = out_view.operand();
  a.lse = const_cast<float*>(lse_rows.const_data_ptr<float>());
  MaybeTensor grad_lse_rows = grad_lse;
  g.grad_lse = floats(grad_lse_rows);
  if (wants(kQuery)) g.grad_q = q_view.operand();
  if (wants(kKey)) g.grad_k = k_view.operand();
  if (wants(kValue)) g.grad_v = v_view.operand();
  g.temperature = wants(kTemperature);
  g.slopes = wants(kSlopes);

  const int64_t units = a.batch * a.kv_heads, group = a.heads / a.kv_heads, rows = group * a.q_len;
  const int64_t dim = (a.head_dim + 15) / 16 * 16;
  g.block_keys = block_keys(std::max(a.head_dim, a.value_dim));
  g.key_blocks = (a.k_len + g.block_keys - 1) / g.block_keys;
  g.query_blocks = (rows + kBackwardRows - 1) / kBackwardRows;
  Tensor wide_mask, stats, delta, q_sums, row_sums, column_sums, sink_rows, turns, mask_turns;
  g.all_stats = other_bits(a);
  if (g.all_stats || any_far(a.lse, rows_all)) {
    g.stats = zeros<float>(stats, {rows_all * kRowStats}, ScalarType::Float);
  }
  // Small calls pay for every allocation: only what this one needs.
  if (g.key_blocks > 1 || wants(kSinks)) {
    delta = torch::stable::empty({rows_all}, ScalarType::Float);
    g.delta = delta.mutable_data_ptr<float>();
  }
  if (g.key_blocks > 1) {
    g.query_turns = zeros<int32_t>(turns, {units * g.query_blocks}, ScalarType::Int);
  }
  if (wants(kQuery) && g.key_blocks > 1) {
    // In double from 64 blocks on, which kFoldedBlocks says.
    q_sums =
        torch::stable::empty({rows_all * dim * (g.key_blocks > 64 ? 2 : 1)}, ScalarType::Float);
    g.grad_q_sums = q_sums.mutable_data_ptr<float>();
  }
  std::optional<View> mask;
  std::optional<MaskOrder> order;
  const bool own_columns = attn_mask && attn_mask->size(attn_mask->dim() - 1) == a.k_len;
  const bool own_rows = attn_mask && attn_mask->size(attn_mask->dim() - 2) == a.q_len;
  if (wants(kMask) && grad_mask.numel()) {
    mask.emplace(grad_mask, in.lead);
    if (own_columns && own_rows) {
      g.grad_mask = mask->operand();
      order.emplace(a, g.grad_mask);
      g.mask_part = order->part.data(), g.mask_place = order->place.data();
      g.mask_shared = order->shared;
      if (order->shared) {
        g.grad_mask.data = zeros<double>(wide_mask, {grad_mask.numel()}, ScalarType::Double);
        g.mask_turns = zeros<int32_t>(mask_turns, {order->parts * g.key_blocks * g.query_blocks},
                                      ScalarType::Int);
      }
    } else if (own_columns) {
      g.column_sums = zeros<float>(column_sums, {a.batch * a.heads * a.k_len}, ScalarType::Float);
    } else {
      g.mask_rows = true;
    }
  }
  if (a.similarity >= Similarity::euclidean || g.temperature || g.slopes || g.mask_rows) {
    g.row_sums = zeros<double>(row_sums, {rows_all * kRowSums}, ScalarType::Double);
  }
  if (wants(kSinks)) g.grad_sink_rows = zeros<float>(sink_rows, {rows_all}, ScalarType::Float);

  attention_backward(g);

  if (g.mask_shared) {
    grad_mask =
        torch::stable::view(torch::stable::to(wide_mask, ScalarType::Float), grad_mask.sizes());
  }
  const auto row_sum = [&](RowSum which) {
    return [&, which](int64_t b, int64_t h, int64_t i) {
      const int64_t unit = b * a.kv_heads + h / group, row = i * group + h % group;
      return g.row_sums[(unit * rows + row) * kRowSums + which];
    };
  };
  if (g.column_sums) {
    reduce(a, *mask, mask->operand().col, a.k_len, [&](int64_t b, int64_t h, int64_t i) {
      return g.column_sums[(b * a.heads + h) * a.k_len + i];
    });
  }
  if (g.mask_rows) reduce(a, *mask, mask->operand().row, a.q_len, row_sum(kSumMask));
  // (heads) and (batch..., heads) seen as (1..., heads, 1, 1) and (batch..., heads, 1, 1)
  const auto per_head = [&](const Tensor& t, bool batched) {
    std::vector<int64_t> sizes(in.lead);
    if (!batched) sizes.assign(in.lead.size(), 1);
    sizes.insert(sizes.end(), {a.heads, 1, 1});
    return View(torch::stable::view(t, sizes), in.lead);
  };
  if (g.temperature) {
    reduce(a, per_head(grad_temperature, false), 0, a.q_len, row_sum(kSumTemperature));
  }
  if (g.slopes) reduce(a, per_head(grad_slopes, true), 0, a.q_len, row_sum(kSumSlope));
  if (wants(kSinks)) {
    reduce(a, per_head(grad_sinks, false), 0, a.q_len, [&](int64_t b, int64_t h, int64_t i) {
      return g.grad_sink_rows[(b * a.heads + h) * a.q_len + i];
    });
  }
  return result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkern, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd)); }

}  // namespace mmkern
