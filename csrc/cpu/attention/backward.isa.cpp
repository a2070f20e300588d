// Attention backward. P = exp(score - lse) is recomputed block by block, and D is what dropout
// multiplies a weight by:
//
//   delta  = sum(grad_out * out) - grad_lse        one number for each row of queries
//   grad_v = (P * D)^T @ grad_out
//   dS     = P * (D * (grad_out @ v^T) - delta)
//   W      = dS * (derivative of the score by q.k)
//   grad_q = W @ k
//   grad_k = W^T @ q
//
// Five products of 2 * head_dim operations a score, against two forward; the elementwise part adds
// some 25 instructions a vector of scores to 5 * head_dim.
//
// A task is one block of keys of one (batch, key head), whose grad_k and grad_v it sums over all
// rows that see it. grad_q is a sum over key blocks: they add to it in order, each waiting for the
// one before it to have passed the same rows. So a sum has the same order and the same bits however
// tasks fall to threads, and the blocks of a single head keep all threads busy.
#include "cpu/attention/backward.h"

#include "cpu/attention/gradients.isa.h"
#include "cpu/parallel.h"

namespace mmkern::MMKERN_ISA {
namespace {

template <class T, class Dot>
class AttentionBackward : ScoreGradients<Dot> {
  using Base = ScoreGradients<Dot>;
  using Base::a_, Base::g_, Base::group_, Base::rows_, Base::words_, Base::value_words_;
  using Base::cosine_, Base::distance_, Base::wants_scores_, Base::sums_rows_;
  using Base::dim_, Base::value_dim_, Base::q_row_, Base::grad_row_, Base::keys_, Base::ld_;
  using Base::folds_, Base::wide_rows_;
  using Base::kPer, Base::take, Base::row_gradients;
  using Buffers = typename Base::Buffers;
  using Word = typename Dot::Word;

 public:
  explicit AttentionBackward(const AttentionBackwardArgs& args) : Base(args) {}

  void run() {
    const int64_t all_rows = a_.batch * a_.heads * a_.q_len, share = 256;
    const int64_t units = a_.batch * a_.kv_heads;
    // Whole units where there are enough of them to balance: nobody waits.
    const bool whole = units >= 4 * num_threads();
    const int64_t tasks = whole ? units : units * g_.key_blocks;
    const auto find = [&](int64_t i) { find_stats(i / g_.query_blocks, i % g_.query_blocks); };
    const auto prepare = [&](int64_t i) {
      find_deltas(i * share, smaller(all_rows, (i + 1) * share));
    };
    const auto work = [&](int64_t i) {
      if (!whole) return run_block(i / g_.key_blocks, i % g_.key_blocks);
      for (int64_t j = 0; j < g_.key_blocks; ++j) run_block(i, j);
    };
    // One block of keys finds the deltas of its rows itself.
    const int64_t finds = g_.stats ? units * g_.query_blocks : 0;
    const int64_t chunks = g_.delta ? (all_rows + share - 1) / share : 0;
    const double flops = 10.0 * all_rows * a_.k_len * a_.head_dim;
    if (flops < 1e6) {  // about 10 microseconds on one core: threads cost as much
      for (int64_t i = 0; i < finds; ++i) find(i);
      for (int64_t i = 0; i < chunks; ++i) prepare(i);
      for (int64_t i = 0; i < tasks; ++i) work(i);
    } else {
      parallel_tasks(finds, find);
      parallel_tasks(chunks, prepare);
      parallel_tasks(tasks, work, take(nullptr).bytes);
    }
  }

 private:
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
      const float* stats = g_.stats ? g_.stats + i * kRowStats : nullptr;
      const float weight = a_.lse[i] == -kInf ? 0.0f
                           : stats && stats[kStatInverse] != 0.0f
                               ? stats[kStatSink]
                               : expf(a_.sinks[r.head] - a_.lse[i]);
      g_.grad_sink_rows[i] = -weight * g_.delta[i];
    }
  }

  // Rows of block i of a unit whose log-sum-exp does not tell: their scores once more, by the same
  // instructions as later on.
  void find_stats(int64_t unit, int64_t i) const {
    const int64_t batch = unit / a_.kv_heads, kv_head = unit % a_.kv_heads;
    const int64_t first = i * kRows, n = smaller(kRows, rows_ - first);
    const Buffers sizes = take(nullptr), b = take(static_cast<char*>(thread_scratch(sizes.bytes)));
    int64_t lo = a_.k_len, hi = 0;
    for (int64_t r = 0; r < n; ++r) {
      Row& row = b.rows[r] = make_row<T>(a_, batch, kv_head, first + r);
      const float lse = a_.lse[flat_index(a_, row)];
      const bool tells = !g_.all_stats && fabsf(lse) < kFarLse;
      if (tells || lse == -kInf) row.hi = row.lo;
      if (row.lo < row.hi) lo = smaller(lo, row.lo), hi = larger(hi, row.hi);
    }
    if (lo >= hi) return;
    pack_rows(b, n);
    for (int64_t j = lo / keys_ * keys_; j < hi; j += keys_) {
      const int64_t count = smaller(keys_, a_.k_len - j);
      const T* k = head_of<const T>(a_.k, batch, kv_head) + j * a_.k.row;
      pack_keys<Dot>(k, a_.k.row, count, a_.head_dim, b.k_panels);
      measure_keys(a_, k, count, b.key_norms);
      Range range[kRows / kTileRows];
      find_ranges(b, n, j, count, range);
      products(b.q, q_row_, words_, b.k_panels, b.weights, range, n, count);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t from = range[r / kTileRows].lo,
                      end = round_up(range[r / kTileRows].hi, kLanes);
        Row& row = b.rows[r];
        if (from >= end || row.lo >= row.hi) continue;
        float* s = b.weights + r * ld_;
        measure_scores<Dot>(a_, row, b.q + r * q_row_, b.k_panels, b.key_norms, s, nullptr, b.tanhs,
                            from, end, j);
        Vec top = set1(-kInf), sum = zero();
        for (int64_t c = from; c < end; c += kLanes) top = max(top, load(s + c));
        const float m = raised(row, reduce_max(top)), base = base_of(row, m);
        const Vec unit = set1(row.unit);
        for (int64_t c = from; c < end; c += kLanes) {
          sum = sum + exp2((load(s + c) - set1(base)) * unit);
        }
        row.l = (row.m == -kInf ? 0.0 : row.l * exp2f((row.m - base) * row.unit)) + reduce_add(sum);
        row.m = m;
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      const Row& row = b.rows[r];
      if (row.lo >= row.hi) continue;
      float* stats = g_.stats + flat_index(a_, row) * kRowStats;
      stats[kStatFound] = 1.0f;
      if (row.l == 0.0) {  // nothing but the sink, whose lse times log2 e may overflow
        stats[kStatSink] = 1.0f;
        continue;
      }
      const float sink = a_.sinks ? a_.sinks[row.head] : -kInf, top = row.m * row.scale;
      const float higher = sink > top ? sink : top, its = expf(sink - higher);
      const double mine = expf(top - higher), total = row.l * mine + its;
      stats[kStatMax] = row.m;
      stats[kStatInverse] = float(mine / total);
      stats[kStatSink] = float(its / total);
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
    memset(b.far_key_sums, 0, keys_ * sizeof(double));
    memset(b.far_column_sums, 0, group_ * keys_ * sizeof(double));
    if (folds_) {
      memset(b.far_k, 0, keys_ * dim_ * sizeof(double));
      memset(b.far_v, 0, keys_ * value_dim_ * sizeof(double));
    }

    for (int64_t i = 0; i < g_.query_blocks; ++i) {
      const int64_t first = i * kRows, n = smaller(kRows, rows_ - first);
      int64_t lo = a_.k_len, hi = 0;
      for (int64_t r = 0; r < n; ++r) {
        b.rows[r] = make_row<T>(a_, batch, kv_head, first + r);
        const int64_t at = flat_index(a_, b.rows[r]);
        b.lse[r] = a_.lse[at];
        b.delta[r] = g_.delta ? g_.delta[at] : 0.0f;
        for (int64_t s = 0; s < kRowStats; ++s) {
          b.stats[r * kRowStats + s] = g_.stats ? g_.stats[at * kRowStats + s] : 0.0f;
        }
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
      if (g_.column_sums) fold(b.far_column_sums, b.column_sums, group_ * keys_, false);
      if (distance_) fold(b.far_key_sums, b.key_sums, keys_, false);
      if (folds_ && i % kFoldedBlocks == kFoldedBlocks - 1) {
        fold(b.far_k, b.grad_k, count * dim_, false);
        fold(b.far_v, b.grad_v, count * value_dim_, false);
      }
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
    find_ranges(b, n, j, count, range);
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

  static void find_ranges(const Buffers& b, int64_t n, int64_t j, int64_t count, Range* range) {
    for (int64_t row = 0; row < n; row += kTileRows) {
      *range++ = visible_range(b.rows + row, smaller(kTileRows, n - row), j, count);
    }
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
#if defined(MMKERN_BF16_DOT) && defined(__aarch64__)
  static void store_pair(Vec even, Vec odd, uint32_t* to) {
    const uint32x4_t high = vshll_n_u16(narrow(odd, bf16{}), 16);
    vst1q_u32(to, vorrq_u32(vmovl_u16(narrow(even, bf16{})), high));
  }
#elif defined(MMKERN_BF16_DOT)
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
      float* total = g_.grad_q_sums + at * dim_ * (wide_rows_ ? 2 : 1);
      float* sums = b.row_sums + r * kRowSums;
      for (int s = 0; sums_rows_ && s < kRowSums; ++s) {
        sums[s] = float(g_.row_sums[at * kRowSums + s] += sums[s]);
      }
      if (!g_.grad_q.data) continue;
      if (wide_rows_) {
        double* wide = reinterpret_cast<double*>(total);
        for (int64_t d = 0; d < dim_; ++d) {
          wide[d] = block > first_block ? wide[d] + mine[d] : mine[d];
          mine[d] = float(wide[d]);
        }
      } else if (block > first_block) {
        for (int64_t d = 0; d < dim_; d += kLanes)
          store(mine + d, load(mine + d) + load(total + d));
      }
      if (block == last_block) {
        const Row& row = b.rows[r];
        finish(row_of<const T>(a_.q, row), mine, row.norm, sums[kSumWeights],
               row_of<T>(g_.grad_q, row));
      } else if (!wide_rows_) {
        memcpy(total, mine, dim_ * sizeof(float));
      }
    }
    if (block < last_block) pass_turn(turn, int32_t(block + 1));
  }

  void finish_keys(const Buffers& b, int64_t batch, int64_t kv_head, int64_t j, int64_t count,
                   const T* k) const {
    if (folds_) {
      for (int64_t i = 0; i < count * dim_; ++i) b.grad_k[i] = float(b.far_k[i] + b.grad_k[i]);
      for (int64_t i = 0; i < count * value_dim_; ++i)
        b.grad_v[i] = float(b.far_v[i] + b.grad_v[i]);
    }
    for (int64_t i = 0; distance_ && i < count; ++i) b.key_sums[i] = float(b.far_key_sums[i]);
    for (int64_t i = 0; g_.column_sums && i < group_ * keys_; ++i) {
      b.column_sums[i] = float(b.far_column_sums[i]);
    }
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
#if defined(MMKERN_BF16_DOT)
      return AttentionBackward<bf16, Bf16Dot>(args).run();
#else
      return AttentionBackward<bf16, F32Dot>(args).run();
#endif
  }
}

}  // namespace mmkern::MMKERN_ISA
