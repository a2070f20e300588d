// What attention asks of its arguments, forward and backward.
#include "cpu/attention/inputs.h"

namespace mmkern {

void check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                     const MaybeTensor& attn_mask, double dropout_p, double scale,
                     int64_t similarity, const MaybeTensor& temperature, int64_t window_left,
                     int64_t window_right, double softcap, const MaybeTensor& alibi_slopes,
                     const MaybeTensor& key_lengths, const MaybeTensor& sinks,
                     const MaybeTensor& seed) {
  const Checked q(query, "query"), k(key, "key"), v(value, "value");
  q.floating().ranked(3);
  const int64_t lead = q.rank - 3, heads = q.size(3);
  k.typed(q.type).ranked(3);
  const int64_t kv_heads = k.size(3), k_len = k.size(2);
  k.shaped(q, lead, {kv_heads, k_len, q.size(1)});
  v.typed(q.type).ranked(3).shaped(q, lead, {kv_heads, k_len, v.size(1)});
  if (heads > 0 && (kv_heads == 0 || heads % kv_heads != 0)) {
    refuse("key", "its ", kv_heads, " heads must divide query's ", heads);
  }
  if (attn_mask) {
    const Checked m(*attn_mask, "attn_mask");
    if (m.type != ScalarType::Bool && m.type != ScalarType::Float) m.typed(q.type);
    bool fits = m.rank == q.rank;
    for (int64_t d = 0; fits && d < q.rank; ++d) {
      fits = m.sizes[d] == 1 || m.sizes[d] == (d == q.rank - 1 ? k_len : q.sizes[d]);
    }
    if (!fits) refuse("attn_mask", "does not broadcast to (..., heads, q_len, k_len), dim by dim");
  }
  check_dropout(dropout_p, seed);
  const auto finite = [](double x) { return x - x == 0.0; };
  if (!finite(scale)) refuse("scale", "expected a finite number, got ", scale);
  check_range<int64_t>("similarity", similarity, 0, int64_t(Similarity::squared_euclidean));
  // Positions stay within int64.
  check_range<int64_t>("window_left", window_left, -1, int64_t{1} << 62);
  check_range<int64_t>("window_right", window_right, -1, int64_t{1} << 62);
  const double cap = float(softcap);  // what the kernels see: 1e-50 would be none
  if (!(finite(cap) && (cap > 0.0 || softcap == 0.0))) {
    refuse("softcap", "expected 0, which is none, or a float32 number above 0, got ", softcap);
  }
  const auto floats = [&](const char* name, const MaybeTensor& t, int64_t dims) {
    if (t) Checked(*t, name).typed(ScalarType::Float).shaped(q, dims, {heads});
  };
  floats("temperature", temperature, 0);
  floats("alibi_slopes", alibi_slopes, lead);
  floats("sinks", sinks, 0);
  if (key_lengths) Checked(*key_lengths, "key_lengths").typed(ScalarType::Long).shaped(q, lead);
}

}  // namespace mmkern
