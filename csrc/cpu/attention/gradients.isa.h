// What attention backward does between its products: from dot products to weights again, and from
// gradients of the weights to those of scores, masks, slopes, temperature and distances, one row of
// a block at a time, in L1.
#pragma once

#include "cpu/attention/backward.h"
#include "cpu/attention/scores.isa.h"
#include "cpu/simd/philox.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kRows = kBackwardRows;
static_assert(kRows % kTileRows == 0);

// Sizes and buffers of a call, and the passes over a row.
template <class Dot>
class ScoreGradients {
 protected:
  using Word = typename Dot::Word;
  static constexpr int kPer = Dot::kPerWord;

  const AttentionBackwardArgs& g_;
  const AttentionArgs& a_ = g_.forward;
  const int64_t group_ = a_.heads / a_.kv_heads, rows_ = group_ * a_.q_len;
  const int64_t words_ = (a_.head_dim + kPer - 1) / kPer,
                value_words_ = (a_.value_dim + kPer - 1) / kPer;
  const int64_t dim_ = round_up(a_.head_dim, kLanes), value_dim_ = round_up(a_.value_dim, kLanes);
  // Rows of q and grad_out as the left side of a product: of words, or padded to serve as the
  // right.
  const int64_t q_row_ = kPer == 1 ? dim_ : words_,
                grad_row_ = kPer == 1 ? value_dim_ : value_words_;
  const int64_t keys_ = g_.block_keys;
  // A line more than the keys: rows a power of two apart would share a few sets of the L1 cache.
  const int64_t ld_ = keys_ + 64 / int64_t(sizeof(float));
  const bool cosine_ = a_.similarity == Similarity::cosine;
  const bool distance_ = a_.similarity >= Similarity::euclidean;
  const bool dot_ = a_.similarity == Similarity::dot && !g_.temperature;
  const bool wants_scores_ = g_.grad_q.data || g_.grad_k.data || g_.grad_mask.data ||
                             g_.column_sums || g_.temperature || g_.slopes || g_.mask_rows;
  const bool folds_ = g_.query_blocks > kFoldedBlocks, wide_rows_ = g_.key_blocks > kFoldedBlocks;
  const bool sums_rows_ = distance_ || g_.temperature || g_.slopes || g_.mask_rows;
  const Dropout dropout_{a_.dropout_p, a_.seed};

  struct Buffers {
    Word *k_panels, *v_panels, *k_rows;             // of the block of keys
    Word *q, *grad, *q_pairs, *grad_pairs;          // of a block of rows
    Word *weight_pairs, *score_pairs, *score_rows;  // bfloat16 copies of the next two
    float *weights, *scores;                        // P D, and W: [kRows][ld_]
    float *grad_k, *grad_v, *grad_q;
    float *key_norms, *key_sums, *column_sums, *similarity, *tanhs, *keep;
    Row* rows;
    float *lse, *delta, *stats, *row_sums;
    int32_t* bad;
    double *far_k, *far_v, *far_key_sums, *far_column_sums;  // over many blocks of rows
    size_t bytes;
  };

  explicit ScoreGradients(const AttentionBackwardArgs& args) : g_(args) {}

  Buffers take(char* base) const {
    Arena a{base};
    Buffers b;
    b.k_panels = a.take<Word>(keys_ * words_);
    b.v_panels = a.take<Word>(keys_ * value_words_);
    b.k_rows = a.take<Word>(keys_ / kPer * dim_);
    b.q = a.take<Word>(kRows * q_row_);
    b.grad = a.take<Word>(kRows * grad_row_);
    b.weights = a.take<float>(kRows * ld_);
    b.scores = a.take<float>(kRows * ld_);
    if (kPer == 1) {
      b.q_pairs = b.q, b.grad_pairs = b.grad;
      b.weight_pairs = reinterpret_cast<Word*>(b.weights);
      b.score_pairs = b.score_rows = reinterpret_cast<Word*>(b.scores);
    } else {
      b.q_pairs = a.take<Word>(kRows / kPer * dim_);
      b.grad_pairs = a.take<Word>(kRows / kPer * value_dim_);
      b.weight_pairs = a.take<Word>(kRows / kPer * ld_);
      b.score_pairs = a.take<Word>(kRows / kPer * ld_);
      b.score_rows = a.take<Word>(kRows * ld_ / kPer);
    }
    b.grad_k = a.take<float>(keys_ * dim_);
    b.grad_v = a.take<float>(keys_ * value_dim_);
    b.grad_q = a.take<float>(kRows * dim_);
    b.key_norms = a.take<float>(keys_);
    b.key_sums = a.take<float>(keys_);
    b.column_sums = a.take<float>(group_ * keys_);
    b.similarity = a.take<float>(keys_);
    b.tanhs = a.take<float>(keys_);
    b.keep = a.take<float>(keys_ + 4 * kLanes);
    b.rows = a.take<Row>(kRows);
    b.lse = a.take<float>(kRows);
    b.delta = a.take<float>(kRows);
    b.stats = a.take<float>(kRows * kRowStats);
    b.row_sums = a.take<float>(kRows * kRowSums);
    b.bad = a.take<int32_t>(keys_);
    b.far_k = a.take<double>(folds_ ? keys_ * dim_ : 0);
    b.far_v = a.take<double>(folds_ ? keys_ * value_dim_ : 0);
    b.far_key_sums = a.take<double>(keys_);
    b.far_column_sums = a.take<double>(group_ * keys_);
    b.bytes = a.used;
    return b;
  }

  // Dot products and products of gradients of row r, [lo, end) -> weights and W, in place.
  void row_gradients(const Buffers& b, int64_t r, float* weights, float* scores, int64_t lo,
                     int64_t end, int64_t j, bool alone) const {
    const Row& row = b.rows[r];
    const bool plain = dot_ && !row.scaled, keeps = g_.temperature || distance_;
    measure_scores<Dot>(a_, row, b.q + r * q_row_, b.k_panels, b.key_norms, weights,
                        keeps ? b.similarity : nullptr, b.tanhs, lo, end, j);
    if (dropout_.on()) {
      dropout_factors(dropout_, row.batch, row.head, row.index, j + lo, end - lo, b.keep + lo);
    }
    const float* stats = b.stats + r * kRowStats;
    if (stats[kStatFound] != 0.0f) {
      const Vec unit = set1(row.unit), base = set1(stats[kStatMax]);
      const Vec inverse = set1(stats[kStatInverse]);
      weigh(b, r, weights, scores, lo, end, alone, plain, stats[kStatSink],
            [=](Vec score) { return exp2((score - base) * unit) * inverse; });
    } else {
      // In two parts: rounding lse * log2 e, some units, to a float would cost weights their last
      // bits.
      const double lse = double(b.lse[r]) * kLog2eExact;
      const float high = float(lse), low = float(lse - double(high));
      const Vec unit = set1(row.unit), shift = set1(-high), rest = set1(-low);
      const float sink = alone && a_.sinks ? expf(a_.sinks[row.head] - b.lse[r]) : 0.0f;
      weigh(b, r, weights, scores, lo, end, alone, plain, sink,
            [=](Vec score) { return exp2(fma(score, unit, shift) + rest); });
    }
    if (!plain && wants_scores_) row_features(b, r, scores, lo, end, j);
  }

  // Scores -> weights, and products of gradients -> W, of which row_features makes more unless
  // `plain`. weight: that of a score.
  template <class F>
  void weigh(const Buffers& b, int64_t r, float* weights, float* scores, int64_t lo, int64_t end,
             bool alone, bool plain, float sink, const F& weight_of) const {
    const Row& row = b.rows[r];
    const Vec chain = set1(plain ? float(row.factor) : 1.0f);
    const bool drops = dropout_.on();
    const auto weight_at = [&](int64_t i) { return weight_of(load(weights + i)); };
    const auto grad_at = [&](int64_t i) {
      return drops ? load(scores + i) * load(b.keep + i) : load(scores + i);
    };
    Vec delta = set1(b.delta[r]);
    // Where the weight is 0, a NaN in the value or in the row does not matter.
    const auto put = [&](int64_t i, Vec weight, Vec grad) {
      grad = select(equal(weight, zero()), zero(), weight * (grad - delta));
      store(scores + i, grad * chain);
      store(weights + i, drops ? weight * load(b.keep + i) : weight);
    };
    if (!alone) {
      for (int64_t i = lo; i < end; i += kLanes) put(i, weight_at(i), grad_at(i));
      return;
    }
    // All that the row sees is here, and so is its delta, free of the rounding of out. Divided by
    // the sum of the weights, whose common error lse leaves: large scores would make it show.
    Vec total = zero(), all = zero();
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec weight = weight_at(i);
      total = total + select(equal(weight, zero()), zero(), weight * grad_at(i));
      all = all + weight;
      store(weights + i, weight);
    }
    delta = set1(reduce_add(total) / (reduce_add(all) + sink) -
                 (g_.grad_lse ? g_.grad_lse[flat_index(a_, row)] : 0.0f));
    for (int64_t i = lo; i < end; i += kLanes) put(i, load(weights + i), grad_at(i));
  }

  // Gradients of a row's scores -> those of what made the scores, and W in their place.
  void row_features(const Buffers& b, int64_t r, float* scores, int64_t lo, int64_t end,
                    int64_t j) const {
    const Row& row = b.rows[r];
    float* sums = b.row_sums + r * kRowSums;
    if (g_.grad_mask.data) {
      const int64_t at = g_.grad_mask.batch[row.batch] + row.head * g_.grad_mask.head +
                         row.index * g_.grad_mask.row + j;
      const int64_t last = smaller(end, a_.k_len - j);
      if (g_.mask_shared) {
        double* to = static_cast<double*>(g_.grad_mask.data) + at;
        for (int64_t i = lo; i < last; ++i) to[i] += scores[i];
      } else {
        float* to = static_cast<float*>(g_.grad_mask.data) + at;
        for (int64_t i = lo; i < last; ++i) to[i] += scores[i];
      }
    }
    if (g_.column_sums) {
      float* to = b.column_sums + row.head % group_ * keys_;
      for (int64_t i = lo; i < end; i += kLanes) store(to + i, load(to + i) + load(scores + i));
    }
    if (g_.mask_rows) sums[kSumMask] = sum(lo, end, [&](int64_t i) { return load(scores + i); });
    if (g_.slopes) {
      sums[kSumSlope] =
          -sum(lo, end, [&](int64_t i) { return load(scores + i) * distance_along(row, j + i); });
    }
    if (a_.softcap != 0.0f) {
      for (int64_t i = lo; i < end; i += kLanes) {
        const Vec t = load(b.tanhs + i), grad = load(scores + i);
        // A hidden key's tanh may be NaN: what lies behind the last key is left from other calls.
        store(scores + i, select(equal(grad, zero()), zero(), grad * fnma(t, t, set1(1.0f))));
      }
    }
    if (g_.temperature) {
      // A hidden key's similarity may be NaN; its gradient is 0.
      sums[kSumTemperature] =
          float(a_.scale) * sum(lo, end, [&](int64_t i) {
            const Vec grad = load(scores + i);
            return select(equal(grad, zero()), zero(), grad * load(b.similarity + i));
          });
    }
    const Vec chain = set1(float(row.factor));
    for (int64_t i = lo; i < end; i += kLanes) {
      Vec grad = load(scores + i) * chain;
      if (cosine_) grad = grad * (load(b.key_norms + i) * set1(row.norm));
      // A hidden key's norm may be NaN.
      if (cosine_) grad = select(equal(load(scores + i), zero()), zero(), grad);
      store(scores + i, grad);
    }
    if (distance_) distance_gradients(b, r, scores, lo, end);
  }

  template <class F>
  static float sum(int64_t lo, int64_t end, const F& term) {
    Vec total = zero();
    for (int64_t i = lo; i < end; i += kLanes) total = total + term(i);
    return reduce_add(total);
  }

  // Of -|q - k| or -|q - k|^2: W times (k - q), so that grad_q = W @ k - q * sum W. Where the two
  // are close that would cancel: there element by element, with W = 0 for the products.
  void distance_gradients(const Buffers& b, int64_t r, float* scores, int64_t lo,
                          int64_t end) const {
    const bool root = a_.similarity == Similarity::euclidean;
    const Row& row = b.rows[r];
    const Word* q = b.q + r * q_row_;
    float total = 0.0f;
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec distance = load(b.similarity + i), grad = load(scores + i);  // minus the distance
      Vec w = root ? zero() - grad / distance : grad * set1(2.0f);
      w = select(equal(grad, zero()) | equal(distance, zero()), zero(), w);
      const Vec square = root ? distance * distance : zero() - distance;
      const Mask close = less(square, (set1(row.norm) + load(b.key_norms + i)) * set1(1.0f / 16));
      if (any(close)) {
        float lanes[kLanes];
        store(lanes, select(close, w, zero()));
        for (int l = 0; l < kLanes; ++l) {
          if (lanes[l] != 0.0f) add_difference(b, r, q, i + l, lanes[l]);
        }
        w = select(close, zero(), w);
      }
      w = as_stored(w);
      store(scores + i, w);
      store(b.key_sums + i, load(b.key_sums + i) + w);
      total += reduce_add(w);
    }
    b.row_sums[r * kRowSums + kSumWeights] = total;
  }

  // As the product will see it: cancelling takes the same rounding on both sides.
  static Vec as_stored(Vec w) {
    if constexpr (kPer == 2) {
      bf16 lanes[kLanes];
      store(lanes, w);
      return load(lanes);
    }
    return w;
  }

  void add_difference(const Buffers& b, int64_t r, const Word* q, int64_t key, float w) const {
    const Word* k = b.k_panels + key / kPanel * kPanel * words_ + key % kPanel;
    float *grad_q = b.grad_q + r * dim_, *grad_k = b.grad_k + key * dim_;
    for (int64_t d = 0; d < a_.head_dim; ++d) {
      const float difference = w * (word_element(k, kPanel, d) - word_element(q, 1, d));
      grad_q[d] += difference;
      grad_k[d] -= difference;
    }
  }
};

}  // namespace
}  // namespace mmkern::MMKERN_ISA
