// Attention backward. With P = exp(score - lse), recomputed block by block, and D what dropout
// multiplies a weight by:
//
//   grad_v = (P D)^T @ grad_out
//   dS     = P * (D * (grad_out @ v^T) - delta),   delta = sum(grad_out * out) - grad_lse of each
//   row grad_q = W @ k,  grad_k = W^T @ q,             W = dS times the derivative of the score by
//   q.k
//
// Five products of 2 * head_dim operations a score, against two forward; the elementwise part adds
// some 25 instructions a vector of scores to 5 * head_dim.
//
// A task is one block of keys of one (batch, key head), whose grad_k and grad_v it sums over all
// rows that see it. grad_q is a sum over key blocks: they add to it in order, each waiting for the
// one before it to have passed the same rows. So a sum has the same order and the same bits however
// tasks fall to threads, and the blocks of a single head keep all threads busy.
#include "cpu/attention_backward.h"

#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kRows = kBackwardRows;
static_assert(kRows % kTileRows == 0);

template <class T, class Dot>
class AttentionBackward {
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
  const bool plain_ = a_.similarity == Similarity::dot && a_.mask_kind == MaskKind::none &&
                      a_.softcap == 0.0f && !a_.alibi_slopes && !g_.temperature;
  const bool wants_scores_ = g_.grad_q.data || g_.grad_k.data || g_.grad_mask.data ||
                             g_.column_sums || g_.temperature || g_.slopes || g_.mask_rows;
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
    float *lse, *delta, *row_sums;
    int32_t* bad;
    size_t bytes;
  };

 public:
  explicit AttentionBackward(const AttentionBackwardArgs& args) : g_(args) {}

  void run() {
    const int64_t all_rows = a_.batch * a_.heads * a_.q_len, share = 256;
    const int64_t units = a_.batch * a_.kv_heads;
    // Whole units where there are enough of them to balance: nobody waits.
    const bool whole = units >= 4 * num_threads();
    const int64_t tasks = whole ? units : units * g_.key_blocks;
    const auto prepare = [&](int64_t i) {
      find_deltas(i * share, smaller(all_rows, (i + 1) * share));
    };
    const auto work = [&](int64_t i) {
      if (!whole) return run_block(i / g_.key_blocks, i % g_.key_blocks);
      for (int64_t j = 0; j < g_.key_blocks; ++j) run_block(i, j);
    };
    // One block of keys finds the deltas of its rows itself.
    const int64_t chunks = g_.delta ? (all_rows + share - 1) / share : 0;
    const double flops = 10.0 * all_rows * a_.k_len * a_.head_dim;
    if (flops < 1e6) {  // about 10 microseconds on one core: threads cost as much
      for (int64_t i = 0; i < chunks; ++i) prepare(i);
      for (int64_t i = 0; i < tasks; ++i) work(i);
    } else {
      parallel_tasks(chunks, prepare);
      parallel_tasks(tasks, work);
    }
  }

 private:
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
    b.row_sums = a.take<float>(kRows * kRowSums);
    b.bad = a.take<int32_t>(keys_);
    b.bytes = a.used;
    return b;
  }

  void find_deltas(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      Row r;
      r.batch = i / a_.q_len / a_.heads, r.head = i / a_.q_len % a_.heads, r.index = i % a_.q_len;
      const T *grad = row_of<const T>(g_.grad_out, r), *out = row_of<const T>(a_.out, r);
      Vec sum = zero();
      for (int64_t d = 0; d < a_.value_dim; d += kLanes) {
        const int n = int(smaller(kLanes, a_.value_dim - d));
        sum = fma(load_n(grad + d, n), load_n(out + d, n), sum);
      }
      g_.delta[i] = reduce_add(sum) - (g_.grad_lse ? g_.grad_lse[i] : 0.0f);
      if (!g_.grad_sink_rows) continue;
      // A sink is a score without a value: its weight times -delta.
      const bool empty = a_.lse[i] == -kInf;
      g_.grad_sink_rows[i] = empty ? 0.0f : -expf(a_.sinks[r.head] - a_.lse[i]) * g_.delta[i];
    }
  }

  // Keys [j * keys_, (j + 1) * keys_) of a unit against all its rows.
  void run_block(int64_t unit, int64_t block) const {
    const Buffers sizes = take(nullptr), b = take(static_cast<char*>(thread_scratch(sizes.bytes)));
    const int64_t batch = unit / a_.kv_heads, kv_head = unit % a_.kv_heads, j = block * keys_;
    const int64_t count = smaller(keys_, a_.k_len - j);
    const T* k = head_of<const T>(a_.k, batch, kv_head) + j * a_.k.row;
    const T* v = head_of<const T>(a_.v, batch, kv_head) + j * a_.v.row;
    pack_keys<Dot>(k, a_.k.row, count, a_.head_dim, b.k_panels);
    int64_t bads = 0;
    if (wants_scores_) pack_keys<Dot>(v, a_.v.row, count, a_.value_dim, b.v_panels);
    if (g_.grad_q.data) {
      bads = pack_values<Dot>(k, a_.k.row, count, a_.head_dim, dim_, b.k_rows, b.bad);
    }
    measure_keys(a_, k, count, b.key_norms);
    memset(b.grad_k, 0, count * dim_ * sizeof(float));
    memset(b.grad_v, 0, count * value_dim_ * sizeof(float));
    memset(b.key_sums, 0, keys_ * sizeof(float));
    memset(b.column_sums, 0, group_ * keys_ * sizeof(float));

    for (int64_t i = 0; i < g_.query_blocks; ++i) {
      const int64_t first = i * kRows, n = smaller(kRows, rows_ - first);
      int64_t lo = a_.k_len, hi = 0;
      for (int64_t r = 0; r < n; ++r) {
        b.rows[r] = make_row<T>(a_, batch, kv_head, first + r);
        const int64_t at = flat_index(a_, b.rows[r]);
        b.lse[r] = a_.lse[at];
        b.delta[r] = g_.delta ? g_.delta[at] : 0.0f;
        if (b.lse[r] == -kInf) b.rows[r].hi = b.rows[r].lo;  // sees nothing
        if (b.rows[r].lo >= b.rows[r].hi) continue;
        lo = smaller(lo, b.rows[r].lo), hi = larger(hi, b.rows[r].hi);
      }
      // Blocks that these rows see: neighbours, since neighbouring rows see overlapping keys.
      const int64_t first_block = lo / keys_, last_block = (hi - 1) / keys_;
      if (lo >= hi || block < first_block || block > last_block) {
        if (g_.mask_shared) pass(mask_turn(unit, block, i), g_.mask_place[unit]);
        continue;
      }
      const bool alone = first_block == last_block;
      run_rows(b, unit, block, i, n, j, count, bads, k, alone);
      if (g_.grad_q.data || sums_rows_) {
        add_rows(b, unit, i, first, n, block, first_block, last_block);
      }
    }
    finish_keys(b, batch, kv_head, j, count, k);
  }

  int32_t* mask_turn(int64_t unit, int64_t block, int64_t i) const {
    return g_.mask_turns + (g_.mask_part[unit] * g_.key_blocks + block) * g_.query_blocks + i;
  }
  static void pass(int32_t* turn, int32_t place) {
    await_turn(turn, place);
    pass_turn(turn, place + 1);
  }

  // n rows from block i against the block of keys: adds to grad_k and grad_v, writes grad_q.
  void run_rows(const Buffers& b, int64_t unit, int64_t block, int64_t i, int64_t n, int64_t j,
                int64_t count, int64_t bads, const T* k, bool alone) const {
    const int64_t tiles = (n + kTileRows - 1) / kTileRows, padded = round_up(count, kLanes);
    Range range[kRows / kTileRows];
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * kTileRows;
      range[t] = visible_range(b.rows + row, smaller(kTileRows, n - row), j, count);
    }
    pack_rows(b, n);
    products(b.q, q_row_, words_, b.k_panels, b.weights, range, n, count);
    if (wants_scores_)
      products(b.grad, grad_row_, value_words_, b.v_panels, b.scores, range, n, count);

    memset(b.row_sums, 0, n * kRowSums * sizeof(float));
    if (distance_) memset(b.grad_q, 0, n * dim_ * sizeof(float));
    if (g_.mask_shared) await_turn(mask_turn(unit, block, i), g_.mask_place[unit]);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t lo = range[r / kTileRows].lo, hi = range[r / kTileRows].hi;
      const int64_t end = round_up(hi, kLanes);
      float *weights = b.weights + r * ld_, *scores = b.scores + r * ld_;
      if (lo < hi && b.rows[r].lo < b.rows[r].hi) {
        row_gradients(b, r, weights, scores, lo, end, j, alone);
        hide(weights, 0, lo), hide(weights, end, padded);
        hide(scores, 0, lo), hide(scores, end, padded);
      } else {
        hide(weights, 0, padded), hide(scores, 0, padded);
      }
    }
    if (g_.mask_shared) pass_turn(mask_turn(unit, block, i), g_.mask_place[unit] + 1);
    if constexpr (kPer == 2) pack_pairs(b, n, padded);

    // Right sides have rows in pairs; a tile of keys takes the rows of which some see it.
    for (int64_t key = 0; key < count; key += kTileRows) {
      const int64_t keys = smaller(kTileRows, count - key);
      int64_t from = 0, to = tiles;
      while (from < to && !overlaps(range[from], key, keys)) ++from;
      while (from < to && !overlaps(range[to - 1], key, keys)) --to;
      from = from * kTileRows / kPer;
      const int64_t depth = (smaller(n, to * kTileRows) + kPer - 1) / kPer - from;
      if (depth <= 0) continue;
      if (g_.grad_v.data) {
        add_product<true>(b.weight_pairs + from * ld_ + key, ld_, keys,
                          b.grad_pairs + from * value_dim_, value_dim_, depth,
                          b.grad_v + key * value_dim_);
      }
      if (g_.grad_k.data) {
        add_product<true>(b.score_pairs + from * ld_ + key, ld_, keys, b.q_pairs + from * dim_,
                          dim_, depth, b.grad_k + key * dim_);
      }
    }
    if (!g_.grad_q.data) return;
    if (!distance_) memset(b.grad_q, 0, n * dim_ * sizeof(float));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t lo = range[t].lo, hi = range[t].hi, row = t * kTileRows;
      if (lo >= hi) continue;
      add_product<false>(b.score_rows + (row * ld_ + lo) / kPer, ld_ / kPer,
                         smaller(kTileRows, n - row), b.k_rows + lo / kPer * dim_, dim_,
                         (hi - lo + kPer - 1) / kPer, b.grad_q + row * dim_);
    }
    for (int64_t i = 0; i < bads; ++i) add_bad_key(b, n, b.bad[i], k + b.bad[i] * a_.k.row);
  }

  static bool overlaps(const Range& range, int64_t key, int64_t keys) {
    return range.lo < key + keys && key < range.hi;
  }
  static void hide(float* row, int64_t lo, int64_t end) {
    if (lo < end) memset(row + lo, 0, (end - lo) * sizeof(float));
  }

  // Rows that see nothing are zeros: what they hold, NaN perhaps, must not reach a key.
  void pack_rows(const Buffers& b, int64_t n) const {
    const T* q[kRows + 1];
    const T* grad[kRows + 1];
    q[n] = grad[n] = nullptr;
    for (int64_t r = 0; r < n; ++r) {
      const bool empty = b.rows[r].lo >= b.rows[r].hi;
      q[r] = empty ? nullptr : row_of<const T>(a_.q, b.rows[r]);
      grad[r] = empty ? nullptr : row_of<const T>(g_.grad_out, b.rows[r]);
      Word *to = b.q + r * q_row_, *grad_to = b.grad + r * grad_row_;
      if (empty) {
        memset(to, 0, q_row_ * sizeof(Word));
        memset(grad_to, 0, grad_row_ * sizeof(Word));
      } else {
        pack_row<Dot>(q[r], a_.head_dim, to, q_row_);
        pack_row<Dot>(grad[r], a_.value_dim, grad_to, grad_row_);
      }
    }
    if constexpr (kPer == 2) {
      for (int64_t r = 0; r < n; r += 2) {
        interleave_rows(q[r], q[r + 1], a_.head_dim, b.q_pairs + r / 2 * dim_);
        interleave_rows(grad[r], grad[r + 1], a_.value_dim, b.grad_pairs + r / 2 * value_dim_);
      }
    }
  }
  static void interleave_rows(const T* even, const T* odd, int64_t dim, Word* to) {
    if constexpr (kPer == 2) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        interleave(even ? even + d : nullptr, odd ? odd + d : nullptr,
                   int(smaller(kLanes, dim - d)), to + d);
      }
    }
  }

  // out[r][key] = sum over words of left[r] * panel[key], where some row of the tile sees the key.
  void products(const Word* left, int64_t left_row, int64_t words, const Word* panels, float* out,
                const Range* range, int64_t n, int64_t count) const {
    for (int64_t panel = 0; panel < count; panel += kPanel) {
      for (int64_t t = 0, row = 0; row < n; ++t, row += kTileRows) {
        if (range[t].lo >= panel + kPanel || range[t].hi <= panel) continue;
        const int64_t vecs = (smaller(range[t].hi - panel, kPanel) + kLanes - 1) / kLanes;
        with_tile(int(smaller(kTileRows, n - row)), int(vecs),
                  ScoreTile<Dot>{left + row * left_row, left_row, words, panels + panel * words,
                                 out + row * ld_ + panel, ld_});
      }
    }
  }

  // out[r] += sum over depth of left * right, for `rows` rows of `dim` columns.
  template <bool kAcross>
  void add_product(const Word* left, int64_t left_row, int64_t rows, const Word* right, int64_t dim,
                   int64_t depth, float* out) const {
    int64_t left_vecs = dim / kLanes;
    for (int64_t column = 0; column < dim;) {  // shares as even as the tile allows
      const int64_t share = (left_vecs + kTileVecs - 1) / kTileVecs;
      const int64_t vecs = (left_vecs + share - 1) / share;
      with_tile(
          int(rows), int(vecs),
          AddTile<Dot, kAcross>{left, left_row, right + column, dim, depth, out + column, dim});
      column += vecs * kLanes;
      left_vecs -= vecs;
    }
  }

  // Dot products and products of gradients of row r, [lo, end) -> weights and W, in place.
  void row_gradients(const Buffers& b, int64_t r, float* weights, float* scores, int64_t lo,
                     int64_t end, int64_t j, bool alone) const {
    const Row& row = b.rows[r];
    float factor = float(row.factor * kLog2eExact);
    const bool plain = plain_ && factor > 0.0f && factor < kInf;
    if (!plain) {
      measure_similarity<Dot>(a_, row, b.q + r * q_row_, b.k_panels, b.key_norms, 1.0f, weights, lo,
                              end);
      if (g_.temperature || distance_) {
        memcpy(b.similarity + lo, weights + lo, (end - lo) * sizeof(float));
      }
      const float scaled = a_.softcap == 0.0f ? factor : float(row.factor);
      add_biases(a_, row, scaled, weights, b.tanhs, lo, end, j);
      factor = 1.0f;
    }
    if (row.lo - j > lo || row.hi - j < end) hide_edges(weights, lo, end, row.lo - j, row.hi - j);
    if (dropout_.on()) {
      dropout_factors(dropout_, row.batch, row.head, row.index, j + lo, end - lo, b.keep + lo);
    }
    // In two parts: rounding lse * log2 e, some units, to a float would cost weights their last
    // bits.
    const double lse = double(b.lse[r]) * kLog2eExact;
    const float high = float(lse), low = float(lse - double(high));
    const Vec scale = set1(factor), shift = set1(-high), rest = set1(-low);
    const Vec chain = set1(plain ? float(row.factor) : 1.0f);
    const bool drops = dropout_.on();
    const auto weight_at = [&](int64_t i) {
      return exp2(fma(load(weights + i), scale, shift) + rest);
    };
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
    } else {
      // All that the row sees is here, and so is its delta, free of the rounding of out. Divided by
      // the sum of the weights, whose common error lse leaves: large scores would make it show.
      Vec total = zero(), all = zero();
      for (int64_t i = lo; i < end; i += kLanes) {
        const Vec weight = weight_at(i);
        total = total + select(equal(weight, zero()), zero(), weight * grad_at(i));
        all = all + weight;
        store(weights + i, weight);
      }
      const float sink = a_.sinks ? expf(a_.sinks[row.head] - b.lse[r]) : 0.0f;
      delta = set1(reduce_add(total) / (reduce_add(all) + sink) -
                   (g_.grad_lse ? g_.grad_lse[flat_index(a_, row)] : 0.0f));
      for (int64_t i = lo; i < end; i += kLanes) put(i, load(weights + i), grad_at(i));
    }
    if (!plain && wants_scores_) row_features(b, r, scores, lo, end, j);
  }

  // Gradients of a row's scores -> those of what made the scores, and W in their place.
  void row_features(const Buffers& b, int64_t r, float* scores, int64_t lo, int64_t end,
                    int64_t j) const {
    const Row& row = b.rows[r];
    float* sums = b.row_sums + r * kRowSums;
    if (g_.grad_mask.data) {
      float* to = static_cast<float*>(g_.grad_mask.data) + g_.grad_mask.batch[row.batch] +
                  row.head * g_.grad_mask.head + row.index * g_.grad_mask.row + j;
      for (int64_t i = lo; i < end; i += kLanes) {
        const int n = int(smaller(kLanes, a_.k_len - j - i));
        store_n(to + i, load_n(to + i, n) + load(scores + i), n);
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
        const Vec t = load(b.tanhs + i);
        store(scores + i, load(scores + i) * fnma(t, t, set1(1.0f)));
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

  // Rows of weights and W in bfloat16: side by side along the keys for grad_q, in pairs of rows for
  // grad_k and grad_v.
  void pack_pairs(const Buffers& b, int64_t n, int64_t padded) const {
    if constexpr (kPer == 2) {
      for (int64_t r = 0; r < n; r += 2) {
        float *weights = b.weights + r * ld_, *scores = b.scores + r * ld_;
        if (r + 1 == n) hide(weights + ld_, 0, padded), hide(scores + ld_, 0, padded);
        bf16* rows = reinterpret_cast<bf16*>(b.score_rows) + r * ld_;
        for (int64_t i = 0; i < padded; i += kLanes) {
          store_pair(load(weights + i), load(weights + ld_ + i), b.weight_pairs + r / 2 * ld_ + i);
          const Vec even = load(scores + i), odd = load(scores + ld_ + i);
          store_pair(even, odd, b.score_pairs + r / 2 * ld_ + i);
          store(rows + i, even);
          store(rows + ld_ + i, odd);
        }
      }
    }
  }
#if defined(__AVX512BF16__)
  static void store_pair(Vec even, Vec odd, uint32_t* to) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(even, bf16{}));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd, bf16{})), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(low, high));
  }
#else
  static void store_pair(Vec, Vec, void*) {}
#endif

  // A key with a NaN or an infinity was packed as zeros: add it to just the rows that see it.
  void add_bad_key(const Buffers& b, int64_t n, int64_t key, const T* k) const {
    for (int64_t r = 0; r < n; ++r) {
      const float w = b.scores[r * ld_ + key];
      if (w == 0.0f) continue;
      for (int64_t d = 0; d < a_.head_dim; ++d) b.grad_q[r * dim_ + d] += w * to_float(k[d]);
    }
  }

  // This block's part of grad_q and of the rows' sums, after that of the block before.
  void add_rows(const Buffers& b, int64_t unit, int64_t i, int64_t first, int64_t n, int64_t block,
                int64_t first_block, int64_t last_block) const {
    int32_t* turn = g_.query_turns + unit * g_.query_blocks + i;
    if (block > first_block) await_turn(turn, int32_t(block));
    for (int64_t r = 0; r < n; ++r) {
      float* mine = b.grad_q + r * dim_;
      const int64_t at = unit * rows_ + first + r;
      float* total = g_.grad_q_sums + at * dim_;
      float* sums = b.row_sums + r * kRowSums;
      for (int s = 0; sums_rows_ && s < kRowSums; ++s) {
        sums[s] = g_.row_sums[at * kRowSums + s] += sums[s];
      }
      if (!g_.grad_q.data) continue;
      if (block > first_block) {
        for (int64_t d = 0; d < dim_; d += kLanes)
          store(mine + d, load(mine + d) + load(total + d));
      }
      if (block == last_block) {
        const Row& row = b.rows[r];
        finish(row_of<const T>(a_.q, row), mine, row.norm, sums[kSumWeights],
               row_of<T>(g_.grad_q, row));
      } else {
        memcpy(total, mine, dim_ * sizeof(float));
      }
    }
    if (block < last_block) pass_turn(turn, int32_t(block + 1));
  }

  void finish_keys(const Buffers& b, int64_t batch, int64_t kv_head, int64_t j, int64_t count,
                   const T* k) const {
    for (int64_t i = 0; i < count; ++i) {
      if (g_.grad_k.data) {
        finish(k + i * a_.k.row, b.grad_k + i * dim_, b.key_norms[i], b.key_sums[i],
               head_of<T>(g_.grad_k, batch, kv_head) + (j + i) * g_.grad_k.row);
      }
      if (g_.grad_v.data) {
        T* to = head_of<T>(g_.grad_v, batch, kv_head) + (j + i) * g_.grad_v.row;
        for (int64_t d = 0; d < a_.value_dim; d += kLanes) {
          store_n(to + d, load(b.grad_v + i * value_dim_ + d),
                  int(smaller(kLanes, a_.value_dim - d)));
        }
      }
    }
    for (int64_t h = 0; g_.column_sums && h < group_; ++h) {
      float* to = g_.column_sums + (batch * a_.heads + kv_head * group_ + h) * a_.k_len + j;
      memcpy(to, b.column_sums + h * keys_, count * sizeof(float));
    }
  }

  // The gradient of one query or key x from the sum of W times what it was compared with.
  void finish(const T* x, const float* sum, float norm, float weights, T* to) const {
    float along = distance_ ? weights : 0.0f;
    // Cosine: what of the gradient points along x changes no angle. A hidden x may hold NaN.
    bool touched = false;
    for (int64_t d = 0; cosine_ && norm < 1e12f && d < dim_; d += kLanes) {
      touched |= any(~equal(load(sum + d), zero()));
    }
    if (touched) {
      Vec total = zero();
      for (int64_t d = 0; d < a_.head_dim; d += kLanes) {
        total = fma(load_n(x + d, int(smaller(kLanes, a_.head_dim - d))), load(sum + d), total);
      }
      along = reduce_add(total) * norm * norm;
    }
    for (int64_t d = 0; d < a_.head_dim; d += kLanes) {
      const int n = int(smaller(kLanes, a_.head_dim - d));
      Vec grad = load(sum + d);
      if (along != 0.0f) grad = fnma(set1(along), load_n(x + d, n), grad);
      store_n(to + d, grad, n);
    }
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  switch (args.forward.dtype) {
    case Dtype::f32: return AttentionBackward<float, F32Dot>(args).run();
    case Dtype::f16: return AttentionBackward<f16, F32Dot>(args).run();
    case Dtype::bf16:
#if defined(__AVX512BF16__)
      return AttentionBackward<bf16, Bf16Dot>(args).run();
#else
      return AttentionBackward<bf16, F32Dot>(args).run();
#endif
  }
}

}  // namespace mmkern::MMKERN_ISA
