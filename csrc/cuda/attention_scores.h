// From dot products to scores, and which of them there are: what attention's kernels, forward and
// backward, do alike. Each function is of one score or one query, whatever tile it lies in; its
// definition is mmkern/reference/attention.py.
#pragma once

#include "cuda/attention.h"
#include "cuda/tile/numerics.h"
#include "cuda/tile/rows.h"

namespace mmkern {

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a > b ? a : b; }

// Where the elements (batch, head, row, ...) of an operand start.
DEVICE int64_t offset_of(const AttentionOperand& o, const ScoreArgs& a, int64_t batch, int head,
                         int64_t row) {
  const int64_t c = batch % a.lead2, b = batch / a.lead2 % a.lead1, d = batch / a.lead2 / a.lead1;
  return d * o.lead[0] + b * o.lead[1] + c * o.lead[2] + head * o.head + row * o.row;
}
template <class T>
DEVICE T* place_of(const AttentionOperand& o, const ScoreArgs& a, int64_t batch, int head,
                   int64_t row) {
  return static_cast<T*>(o.data) + offset_of(o, a, batch, head, row);
}

// How many keys of a batch entry are there; a length outside [0, k_len] counts as the nearer end.
DEVICE int key_length(const ScoreArgs& a, int64_t batch) {
  if (!a.lengths) return a.k_len;
  const int64_t given = load_bits(a.lengths + batch);
  return given < 0 ? 0 : given < a.k_len ? int(given) : a.k_len;
}
// What is added to a query's number to get its position on the key axis.
DEVICE int position_offset(const ScoreArgs& a, int length) {
  return a.lower_right ? length - a.q_len : 0;
}

// Keys [lo, hi) that some query of positions first .. last sees, and those [full_lo, full_hi) that
// each of them sees, masks aside: tiles within need no test of positions.
struct KeyRange {
  int lo, hi, full_lo, full_hi;
};
DEVICE KeyRange keys_seen(const ScoreArgs& a, int length, int first, int last) {
  return {most(first - a.left, 0), least(last + a.right + 1, length), last - a.left,
          least(first + a.right + 1, length)};
}
// The other way round, the queries (as numbers from 0) that see keys first .. last.
DEVICE KeyRange queries_seeing(const ScoreArgs& a, int length, int first, int last) {
  const int offset = position_offset(a, length);
  const bool any = first < length, whole = last < length;
  last = least(last, length - 1);
  return {most(first - offset - a.right, 0), any ? least(last - offset + a.left + 1, a.q_len) : 0,
          last - offset - a.right, whole ? least(first - offset + a.left + 1, a.q_len) : 0};
}
DEVICE bool sees(const ScoreArgs& a, int position, int key, int length) {
  return key < length && key >= position - a.left && key <= position + a.right;
}

// What the scores of one query need. A row past the end is held to be the last, so that its mask
// may be read.
struct ScoreRow {
  int position;
  float factor, slope;
  const uint8_t* mask;
};
DEVICE int mask_bytes(const ScoreArgs& a) {
  return a.mask_kind == MaskKind::f32 ? 4 : a.mask_kind == MaskKind::boolean ? 1 : 2;
}
DEVICE ScoreRow score_row(const ScoreArgs& a, int64_t batch, int head, int row, int offset) {
  ScoreRow r{row + offset, a.scale, 0.0f, nullptr};
  row = least(row, a.q_len - 1);
  if (a.temperature) r.factor *= load_bits(a.temperature + head);
  if (a.slopes) r.slope = load_bits(a.slopes + batch * a.heads + head);
  if (a.mask_kind != MaskKind::none) {
    r.mask = static_cast<const uint8_t*>(a.mask.data) +
             offset_of(a.mask, a, batch, head, row) * mask_bytes(a);
  }
  return r;
}

// The mask's term for a key: minus infinity hides it, and of a bool mask all else is 0. T: the
// dtype of the query, which a float mask has if it is not float32.
template <class T>
DEVICE float mask_term(const ScoreArgs& a, const ScoreRow& r, int key) {
  const int64_t at = key * a.mask.col;
  if (a.mask_kind == MaskKind::boolean) return load_bits(r.mask + at) ? 0.0f : -INFINITY;
  if (a.mask_kind == MaskKind::f32) return load_bits(reinterpret_cast<const float*>(r.mask) + at);
  return load_one(reinterpret_cast<const T*>(r.mask) + at);
}

DEVICE float inverse_norm(float square) {
  const float norm = square_root(square);
  return 1.0f / (norm < 1e-12f ? 1e-12f : norm);  // of NaN, NaN
}
// From a dot product and squared norms, or, where `exact`, from a squared distance.
DEVICE float similarity_of(Similarity kind, bool exact, float qk, float q_square, float k_square) {
  if (kind == Similarity::dot) return qk;
  if (kind == Similarity::cosine) return qk * inverse_norm(q_square) * inverse_norm(k_square);
  float square = exact ? qk : q_square + k_square - 2.0f * qk;
  square = square < 0.0f ? 0.0f : square;
  return kind == Similarity::euclidean ? -square_root(square) : -square;
}

// A similarity's score in natural units, before the mask. Times log2 e, what a cap, a slope or a
// mask holds could overflow. `capped`, tanh(score / softcap), is what backward needs of the cap.
DEVICE float score_of(const ScoreArgs& a, const ScoreRow& r, float similarity, int key,
                      float* capped) {
  float s = similarity * r.factor;
  if (a.softcap > 0.0f) {
    *capped = hyperbolic_tangent(s / a.softcap);
    s = a.softcap * *capped;
  }
  if (a.slopes) {
    const int distance = r.position - key;
    s -= r.slope * float(distance < 0 ? -distance : distance);
  }
  return s;
}
// The score after the mask, minus infinity where hidden. edge: whether positions must be tested.
template <class T>
DEVICE float masked_score(const ScoreArgs& a, const ScoreRow& r, float s, int key, int length,
                          bool edge) {
  if (edge && !sees(a, r.position, key, length)) return -INFINITY;
  if (a.mask_kind == MaskKind::none) return s;
  const float term = mask_term<T>(a, r, key);
  return term == -INFINITY ? term : s + term;
}

// Which keys 4 block .. 4 block + 3 dropout keeps of a query, bit by bit. mmkern.reference.philox
// defines it: by batch entry, head, the query's number and the key, whatever the tile.
struct Dropper {
  uint64_t seed;
  uint32_t batch, threshold;
};
DEVICE Dropper dropper_of(const ScoreArgs& a, int64_t batch) {
  Dropper d{0, uint32_t(batch), a.threshold};
  if (a.seed) {
    d.seed = uint64_t(load_bits(a.seed));
    if (a.seeds > 1) d.batch += uint32_t(load_bits(a.seed + 1));
  }
  return d;
}
DEVICE uint32_t kept_bits(const Dropper& d, int head, int row, int block) {
  const PhiloxWords found = philox(d.seed, uint32_t(block), uint32_t(row), uint32_t(head), d.batch);
  uint32_t bits = 0;
  UNROLL for (int i = 0; i < 4; ++i) bits |= uint32_t(found.w[i] >= d.threshold) << i;
  return bits;
}

}  // namespace mmkern
