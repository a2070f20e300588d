// Attention forward: out = softmax(scores) @ value without ever holding a row of scores longer than
// kKeys.
//
//   score = softcap(similarity(q, k) * scale * temperature) + ALiBi + mask
//   for each block of keys, with the row's maximum m, sum l and output o so far:
//     m' = max(m, maximum of the block)
//     p  = e^(score - m')
//     l  = l * e^(m - m') + sum(p)
//     o  = o * e^(m - m') + p @ v
//     m  = m'
//   out = o / l,  lse = m + log(l)
//
// Powers are those of 2: log2(e) comes in where scores become exponents.
//
// A task is one (batch, key head) and a chunk of its query rows, the rows of all query heads that
// share the key head side by side. For each block of keys it packs keys and values once (one read,
// one write, in L2) and uses them for all its rows. Work per key and value element and row: two
// multiply-adds, 2 / kLanes instructions; the softmax adds about 12 instructions per kLanes scores,
// which is 12 / (2 * head_dim).
#include "cpu/attention/forward.h"

#include "cpu/attention/scores.isa.h"
#include "cpu/attention/tiles.isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/philox.isa.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kBlockRows = 8 * kTileRows;  // query rows whose scores are held at once
constexpr int64_t kChunkBlocks = 8;            // at most this many blocks share one packing of keys
constexpr int64_t kKeys = 256;                 // keys per block; half where head dims exceed 128
static_assert(kDirectRows == 2 * kTileRows);

template <class Dot>
struct Buffers {
  using Word = typename Dot::Word;
  Word *q, *k, *v, *p;
  float *scores, *o, *key_norms, *keep;
  Row* rows;
  int32_t* bad;
  double* far;  // sums of values over many blocks of keys, where there are
  size_t bytes;

  Buffers(char* base, int64_t rows_n, int64_t keys, int64_t words, int64_t padded, bool folds) {
    Arena a{base};
    constexpr int per = Dot::kPerWord;
    q = a.take<Word>(rows_n * words);
    k = a.take<Word>(keys * words);
    v = a.take<Word>(keys / per * padded);
    scores = a.take<float>(kBlockRows * keys);
    p = per == 1 ? reinterpret_cast<Word*>(scores) : a.take<Word>(kBlockRows * keys / per);
    o = a.take<float>(rows_n * padded);
    key_norms = a.take<float>(keys);
    keep = a.take<float>(keys + 4 * kLanes);
    rows = a.take<Row>(rows_n);
    bad = a.take<int32_t>(keys);
    far = a.take<double>(folds ? rows_n * padded : 0);
    bytes = a.used;
  }
};

// One call of the kernel for a storage type T and a way of multiplying. Unpacked reading (direct_)
// needs F32Dot.
template <class T, class Dot>
class Attention {
  using Word = typename Dot::Word;
  static constexpr int kPer = Dot::kPerWord;

  const AttentionArgs& a_;
  const AttentionCall& call_;
  const int64_t group_ = a_.heads / a_.kv_heads, rows_ = group_ * a_.q_len;
  const int64_t words_ = (a_.head_dim + kPer - 1) / kPer;
  const int64_t padded_ = round_up(a_.value_dim, kLanes);
  const int64_t keys_ = larger(a_.head_dim, a_.value_dim) <= 128 ? kKeys : kKeys / 2;
  const bool masked_ = a_.mask_kind != MaskKind::none;
  const Dropout dropout_{a_.dropout_p, a_.seed};
  // Whether a tile may hold keys that some of its rows must not see.
  const bool hides_ =
      masked_ || (a_.q_len > 1 && (a_.is_causal || a_.window_left >= 0 || a_.window_right >= 0));
  const bool direct_;
  int64_t chunk_, chunks_;

 public:
  Attention(const AttentionCall& call, bool direct) : a_(*call.args), call_(call), direct_(direct) {
    const int64_t blocks = (rows_ + kBlockRows - 1) / kBlockRows;
    // Four tasks a thread balance the load; which rows share a task changes no result.
    const int64_t want = 4 * num_threads() / (a_.batch * a_.kv_heads * call.splits) + 1;
    chunk_ = larger(1, smaller(kChunkBlocks, blocks / want)) * kBlockRows;
    chunks_ = (rows_ + chunk_ - 1) / chunk_;
  }

  void run() {
    const int64_t units = a_.batch * a_.kv_heads * call_.splits, tasks = units * chunks_;
    const auto task = [this, units](int64_t i) { run_task(i % units, chunks_ - 1 - i / units); };
    const double flops =
        2.0 * a_.batch * a_.heads * a_.q_len * a_.k_len * (a_.head_dim + a_.value_dim);
    if (flops < 1e6) {  // about 10 microseconds on one core: threads cost as much
      for (int64_t i = 0; i < tasks; ++i) task(i);
    } else {
      parallel_tasks(tasks, task);
    }
    if (call_.splits > 1) {
      for (int64_t i = 0; i < a_.batch * a_.kv_heads; ++i) merge_splits(i);
    }
  }

 private:
  void run_task(int64_t unit, int64_t chunk) {
    const int64_t split = unit % call_.splits, kv_head = unit / call_.splits % a_.kv_heads;
    const int64_t batch = unit / call_.splits / a_.kv_heads;
    const int64_t first = chunk * chunk_, n = smaller(chunk_, rows_ - first);
    const bool folds = call_.splits == 1 && a_.k_len > kFoldedBlocks * keys_;
    const size_t bytes = Buffers<Dot>(nullptr, n, keys_, words_, padded_, folds).bytes;
    const Buffers<Dot> b(static_cast<char*>(thread_scratch(bytes)), n, keys_, words_, padded_,
                         folds);

    const T* keys = head_of<const T>(a_.k, batch, kv_head);
    const T* values = head_of<const T>(a_.v, batch, kv_head);
    // Rows of a transposed projection lie far apart: ask for all before the first is waited for.
    for (int64_t h = 0; h < group_; ++h) {
      const T* q = head_of<const T>(a_.q, batch, kv_head * group_ + h);
      fetch_rows<true>(q + first / group_ * a_.q.row, a_.q.row, (n + group_ - 1) / group_,
                       a_.head_dim);
    }
    if (!direct_ && n == rows_) {  // one chunk: its first block of keys starts at or near 0
      fetch_rows<true>(keys, a_.k.row, smaller(keys_, a_.k_len), a_.head_dim);
      fetch_rows<true>(values, a_.v.row, smaller(keys_, a_.k_len), a_.value_dim);
    }

    int64_t lo = a_.k_len, hi = 0;
    for (int64_t i = 0; i < n; ++i) {
      b.rows[i] = make_row<T>(a_, batch, kv_head, first + i);
      pack_row<Dot>(row_of<const T>(a_.q, b.rows[i]), a_.head_dim, b.q + i * words_, words_);
      if (b.rows[i].lo < b.rows[i].hi) {
        lo = smaller(lo, b.rows[i].lo);
        hi = larger(hi, b.rows[i].hi);
      }
    }
    memset(b.o, 0, n * padded_ * sizeof(float));

    const int64_t per_split = round_up((a_.k_len + call_.splits - 1) / call_.splits, keys_);
    lo = larger(lo, split * per_split) / keys_ * keys_;  // block borders do not depend on the rows
    hi = smaller(hi, (split + 1) * per_split);
    for (int64_t j = lo; j < hi; j += keys_) {
      const int64_t count = smaller(keys_, hi - j);
      const T *k = keys + j * a_.k.row, *v = values + j * a_.v.row;
      int64_t bads = 0;
      measure_keys(a_, k, count, b.key_norms);
      bool direct = direct_;
      for (int64_t i = 0; direct && hides_ && i < count; ++i) {
        direct = all_finite(v + i * a_.v.row, a_.value_dim);
      }
      if (!direct) {
        pack_keys<Dot>(k, a_.k.row, count, a_.head_dim, b.k);
        bads = pack_values<Dot>(v, a_.v.row, count, a_.value_dim, padded_, b.v, b.bad);
      }
      const int64_t next = smaller(keys_, hi - j - count), share = (next * kBlockRows + n - 1) / n;
      for (int64_t i = 0; i < n; i += kBlockRows) {
        const int64_t from = count + i / kBlockRows * share;
        fetch_rows<false>(k + from * a_.k.row, a_.k.row, smaller(share, count + next - from),
                          a_.head_dim);
        fetch_rows<false>(v + from * a_.v.row, a_.v.row, smaller(share, count + next - from),
                          a_.value_dim);
        run_block(b, i, smaller(kBlockRows, n - i), j, count, k, v, direct, bads);
      }
      if (folds && (j / keys_ % kFoldedBlocks == kFoldedBlocks - 1 || j + keys_ >= hi)) {
        fold_values(b, n, j + keys_ >= hi);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (call_.splits == 1) {
        finish(b.rows[i], b.o + i * padded_);
      } else {
        float* to = partial(batch * a_.kv_heads + kv_head, split, first + i);
        memcpy(to, b.o + i * padded_, a_.value_dim * sizeof(float));
        to[a_.value_dim] = b.rows[i].m;
        to[a_.value_dim + 1] = float(b.rows[i].l);
      }
    }
  }

  // What the rows have summed since the last time goes to `far`; where `done`, all of it to o.
  void fold_values(const Buffers<Dot>& b, int64_t n, bool done) const {
    for (int64_t i = 0; i < n; ++i) {
      Row& r = b.rows[i];
      double* far = b.far + i * padded_;
      float* o = b.o + i * padded_;
      const float factor = r.far_m == -kInf ? 0.0f : exp2f(step(r, r.far_m, r.m));
      for (int64_t d = 0; r.far_m != -kInf && d < padded_; ++d) far[d] *= factor;
      fold(far, o, padded_, r.far_m == -kInf);
      r.far_m = r.m;
      for (int64_t d = 0; done && d < padded_; ++d) o[d] = float(far[d]);
    }
  }

  // Rows [first, first + n) of the task against keys [j, j + count).
  void run_block(const Buffers<Dot>& b, int64_t first, int64_t n, int64_t j, int64_t count,
                 const T* k, const T* v, bool direct, int64_t bads) {
    Range range[kBlockRows / kTileRows];
    const int64_t tiles = (n + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * kTileRows;
      range[t] = visible_range(b.rows + first + row, smaller(kTileRows, n - row), j, count);
    }
    // A panel of keys stays in L1 over all rows.
    for (int64_t panel = 0; panel < count; panel += kPanel) {
      for (int64_t t = 0; t < tiles; ++t) {
        if (range[t].lo >= panel + kPanel || range[t].hi <= panel) continue;
        const int64_t row = t * kTileRows, rows = smaller(kTileRows, n - row);
        const Word* q = b.q + (first + row) * words_;
        float* scores = b.scores + row * keys_;
        if constexpr (kPer == 1) {
          if (direct) {
            const int64_t end = smaller(range[t].hi, panel + kPanel);
            for (int64_t i = larger(panel, range[t].lo); i < end; i += kLanes) {
              with_tile<kTileRows, 1>(int(rows), 1,
                                      DirectScoreTile<T>{q, a_.head_dim, k + i * a_.k.row, a_.k.row,
                                                         count - i, scores + i, keys_});
            }
            continue;
          }
        }
        const int64_t vecs = (smaller(range[t].hi - panel, kPanel) + kLanes - 1) / kLanes;
        with_tile(int(rows), int(vecs),
                  ScoreTile<Dot>{q, words_, words_, b.k + panel * words_, scores + panel, keys_});
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t lo = range[t].lo, hi = range[t].hi;
      if (lo >= hi) continue;
      const int64_t row = t * kTileRows, rows = smaller(kTileRows, n - row);
      float rescale[kTileRows];
      for (int64_t i = 0; i < rows; ++i) {
        rescale[i] =
            softmax_row(b, b.rows[first + row + i], b.q + (first + row + i) * words_,
                        b.scores + (row + i) * keys_, b.p + (row + i) * keys_ / kPer, lo, hi, j);
      }
      const Word* p = b.p + row * keys_ / kPer + lo / kPer;
      float* o = b.o + (first + row) * padded_;
      int64_t left = padded_ / kLanes;
      for (int64_t column = 0; column < padded_;) {  // shares as even as the tile allows
        const int64_t share = (left + kTileVecs - 1) / kTileVecs, vecs = (left + share - 1) / share;
        if (direct) {
          if constexpr (kPer == 1) {
            with_tile(int(rows), int(vecs),
                      ValueTile<StoredDot<T>, T>{p, keys_, v + lo * a_.v.row + column, a_.v.row,
                                                 hi - lo, rescale, o + column, padded_});
          }
        } else {
          with_tile(
              int(rows), int(vecs),
              ValueTile<Dot, Word>{p, keys_ / kPer, b.v + lo / kPer * padded_ + column, padded_,
                                   (hi - lo + kPer - 1) / kPer, rescale, o + column, padded_});
        }
        column += vecs * kLanes;
        left -= vecs;
      }
      for (int64_t i = 0; i < bads; ++i) {
        if (b.bad[i] < lo || b.bad[i] >= hi) continue;
        add_bad_value(b.p + row * keys_ / kPer, rows, b.bad[i], v + b.bad[i] * a_.v.row, o);
      }
    }
  }

  // A value row with a NaN or an infinity was packed as zeros: add it to just the rows that see its
  // key.
  void add_bad_value(const Word* p, int64_t rows, int64_t key, const T* value, float* o) {
    for (int64_t i = 0; i < rows; ++i) {
      const float weight = word_element(p + i * keys_ / kPer, 1, key);
      if (weight == 0.0f) continue;
      for (int64_t d = 0; d < a_.value_dim; ++d) o[i * padded_ + d] += weight * to_float(value[d]);
    }
  }

  // Scores [lo, hi) of one row -> weights, in place for float32; the rest of the last vector gets
  // weight 0. Returns the factor by which what the row has summed so far shrinks.
  float softmax_row(const Buffers<Dot>& b, Row& r, const Word* q, float* s, Word* p, int64_t lo,
                    int64_t hi, int64_t j) {
    const int64_t end = round_up(hi, kLanes);
    measure_scores<Dot>(a_, r, q, b.k, b.key_norms, s, nullptr, nullptr, lo, end, j);

    Vec top0 = set1(-kInf), top1 = top0;
    int64_t i = lo;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      top0 = max(top0, load(s + i));
      top1 = max(top1, load(s + i + kLanes));
    }
    if (i < end) top0 = max(top0, load(s + i));
    const float m = raised(r, reduce_max(max(top0, top1))), base = base_of(r, m);
    const float rescale = r.m == -kInf ? 0.0f
                          : r.m == m   ? 1.0f
                                       : first_lane(exp2(set1(step(r, r.m, base))));
    r.m = m;

    // Dropout acts on the weights, not on the sum that they are divided by.
    if (dropout_.on()) {
      dropout_factors(dropout_, r.batch, r.head, r.index, j + lo, end - lo, b.keep + lo);
    }
    Vec sum = zero();
    const auto weigh = [&](const auto& exponent) {
      for (int64_t i = lo; i < end; i += kLanes) {
        const Vec weight = exp2(exponent(load(s + i)));
        sum = sum + weight;
        store_weight(p, i, dropout_.on() ? weight * load(b.keep + i) : weight);
      }
    };
    const Vec unit = set1(r.unit), from = set1(base), shift = set1(-(base * r.unit));
    if (is_near(r, base)) {
      weigh([=](Vec score) { return fma(score, unit, shift); });
    } else {
      weigh([=](Vec score) { return (score - from) * unit; });
    }
    r.l = r.l * rescale + reduce_add(sum);
    return rescale;
  }

  static void store_weight(float* p, int64_t i, Vec weight) { store(p + i, weight); }
  static void store_weight(uint32_t* p, int64_t i, Vec weight) {
    store(reinterpret_cast<bf16*>(p) + i, weight);
  }

  float* partial(int64_t unit, int64_t split, int64_t row) const {
    return call_.partials + ((unit * call_.splits + split) * rows_ + row) * (a_.value_dim + 2);
  }

  void merge_splits(int64_t unit) {
    float* o = static_cast<float*>(thread_scratch(padded_ * sizeof(float)));
    for (int64_t i = 0; i < rows_; ++i) {
      Row r = make_row<T>(a_, unit / a_.kv_heads, unit % a_.kv_heads, i);
      memset(o, 0, padded_ * sizeof(float));
      for (int64_t split = 0; split < call_.splits; ++split) {
        const float* from = partial(unit, split, i);
        const float m = from[a_.value_dim], top = base_of(r, m > r.m ? m : r.m);
        const float mine = r.m == -kInf ? 0.0f : exp2f(step(r, r.m, top));
        const float its = m == -kInf ? 0.0f : exp2f(step(r, m, top));
        for (int64_t d = 0; d < a_.value_dim; ++d) o[d] = o[d] * mine + from[d] * its;
        r.l = r.l * mine + from[a_.value_dim + 1] * its;
        r.m = m > r.m ? m : r.m;
      }
      finish(r, o);
    }
  }

  void finish(const Row& r, const float* o) {
    double top = peak(r), total = r.l, mine = 1.0;
    if (a_.sinks && (top > -kInf || a_.sinks[r.head] > -kInf)) {  // one more score, with no value
      const double sink = a_.sinks[r.head], higher = sink > top ? sink : top;
      mine = expf(float(top - higher));
      total = total * mine + expf(float(sink - higher));
      top = higher;
    }
    const Vec factor = set1(total == 0.0 ? 0.0f : float(mine / total));
    T* out = row_of<T>(a_.out, r);
    for (int64_t d = 0; d < a_.value_dim; d += kLanes) {
      store_n(out + d, load(o + d) * factor, int(smaller(a_.value_dim - d, kLanes)));
    }
    // Backward subtracts this from scores: its error is one of all weights of the row.
    const double lse = top + double(log2f(float(total))) * kLn2Exact;
    a_.lse[flat_index(a_, r)] = total == 0.0 ? -kInf : float(lse);
  }
};

}  // namespace

void attention(const AttentionCall& call) {
  const AttentionArgs& a = *call.args;
  const int64_t rows = a.heads / a.kv_heads * a.q_len;
  const bool direct = rows <= kDirectRows && a.head_dim % kLanes == 0 &&
                      a.value_dim % kLanes == 0 && a.similarity <= Similarity::cosine;
  switch (a.dtype) {
    case Dtype::f32: return Attention<float, F32Dot>(call, direct).run();
    case Dtype::f16: return Attention<f16, F32Dot>(call, direct).run();
    case Dtype::bf16:
#if defined(MMKERN_BF16_DOT)
      if (!direct) return Attention<bf16, Bf16Dot>(call, false).run();
#endif
      return Attention<bf16, F32Dot>(call, direct).run();
  }
}

}  // namespace mmkern::MMKERN_ISA
