// Attention forward: out = softmax(scores) @ value without ever holding a row of scores longer than
// kKeys.
//
//   score = similarity(q, k) * scale * temperature, soft-capped, plus ALiBi, plus mask; then for
//   every block of keys: m' = max(m, block max), p = 2^(score - m'), l = l * 2^(m - m') + sum p, o
//   = o * 2^(m - m') + p @ v and at the end out = o / l, lse = m + log l. Scores are in units of
//   log2 from the start.
//
// A task is one (batch, key head) and a chunk of its query rows, the rows of all query heads that
// share the key head side by side. For each block of keys it packs keys and values once (one read,
// one write, in L2) and uses them for all its rows. Work per key and value element and row: two
// multiply-adds, 2 / kLanes instructions; the softmax adds about 12 instructions per kLanes scores,
// which is 12 / (2 * head_dim).
#include "cpu/attention.h"

#include "cpu/attention_tiles.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace mmkern::MMKERN_ISA {
namespace {

constexpr int64_t kBlockRows = 8 * kTileRows;  // query rows whose scores are held at once
constexpr int64_t kChunkBlocks = 8;            // at most this many blocks share one packing of keys
constexpr int64_t kKeys = 256;                 // keys per block; half where head dims exceed 128
constexpr int64_t kDirectTiles = 2;            // up to this many tiles of rows read keys unpacked

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What a query row needs beside its elements. Keys [lo, hi) are visible, as far as the mask allows.
struct Row {
  int64_t head, index;  // which query: head and position
  int64_t lo, hi;
  float factor;         // score = similarity * factor, in log2 units unless soft-capped
  float norm;           // squared length of the query
  float slope;          // ALiBi, log2 units
  int64_t position;     // of the query on the key axis
  const uint8_t* mask;  // first element of its row, in bytes, or null
  float m, l;           // running maximum and sum
};

// Bump allocation inside one thread's scratch; called once with null to measure.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

template <class Dot>
struct Buffers {
  using Word = typename Dot::Word;
  Word *q, *k, *v, *p;
  float *scores, *o, *key_norms;
  Row* rows;
  int32_t* bad;
  size_t bytes;

  Buffers(char* base, int64_t rows_n, int64_t keys, int64_t words, int64_t padded) {
    Arena a{base};
    constexpr int per = Dot::kPerWord;
    q = a.take<Word>(rows_n * words);
    k = a.take<Word>(keys * words);
    v = a.take<Word>(keys / per * padded);
    scores = a.take<float>(kBlockRows * keys);
    p = per == 1 ? reinterpret_cast<Word*>(scores) : a.take<Word>(kBlockRows * keys / per);
    o = a.take<float>(rows_n * padded);
    key_norms = a.take<float>(keys);
    rows = a.take<Row>(rows_n);
    bad = a.take<int32_t>(keys);
    bytes = a.used;
  }
};

// Asks for rows that will be read soon, into L1 (kNear) or L2.
template <bool kNear, class T>
void fetch_rows(const T* rows, int64_t row, int64_t n, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(rows + i * row + d, 0, kNear ? 3 : 2);
  }
}

template <class T>
float squared_norm(const T* x, int64_t n) {
  Vec sum = zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec v = load_n(x + d, n - d < kLanes ? int(n - d) : kLanes);
    sum = fma(v, v, sum);
  }
  return reduce_add(sum);
}

// 1 / max(|x|, 1e-12), by way of the largest element where the squares overflow or underflow.
template <class T>
float reciprocal_norm(const T* x, int64_t n) {
  float square = squared_norm(x, n);
  float top = 1.0f;
  if (!(square > 1e-30f && square < 1e38f)) {
    top = 0.0f;
    for (int64_t d = 0; d < n; ++d) {
      const float v = fabsf(to_float(x[d]));
      if (!(v <= top)) top = v;
    }
    if (top == 0.0f || !(top < kInf)) return top == 0.0f ? 1e12f : top * 0.0f;
    square = 0.0f;
    for (int64_t d = 0; d < n; ++d) square += (to_float(x[d]) / top) * (to_float(x[d]) / top);
  }
  const float norm = sqrtf(square);
  return norm < 1e-12f / top ? 1e12f : 1.0f / norm / top;
}

// tanh by way of expm1, exact near 0 where the score is not capped at all.
inline Vec tanh(Vec x) {
  const Vec a = min(set1(10.0f), abs(x));
  const Vec t = a * set1(2.0f * kLog2e), n = round(t);
  const Vec power = pow2(n);
  const Vec em1 = fma(power, exp2m1_fraction(t - n), power - set1(1.0f));
  const Vec y = em1 / (em1 + set1(2.0f));
  return select(less(x, zero()), zero() - y, y);
}

[[maybe_unused]] float word_element(const float* words, int64_t stride, int64_t d) {
  return words[d * stride];
}
[[maybe_unused]] float word_element(const uint32_t* words, int64_t stride, int64_t d) {
  return to_float(bf16{uint16_t(words[d / 2 * stride] >> (d % 2 * 16))});
}

// Arguments of a register tile, whose size with_tile picks.
template <class Dot>
struct ScoreTile {
  const typename Dot::Word* q;
  int64_t words;
  const typename Dot::Word* k;
  float* scores;
  int64_t scores_row;
  template <int kRows, int kVecs>
  void run() const {
    product_tile<Dot, kRows, kVecs>(q, words, k, kPanel, words, scores, scores_row);
  }
};
template <class Dot, class Column>
struct ValueTile {
  const typename Dot::Word* p;
  int64_t p_row;
  const Column* v;
  int64_t v_row, depth;
  const float* rescale;
  float* o;
  int64_t o_row;
  template <int kRows, int kVecs>
  void run() const {
    update_tile<Dot, kRows, kVecs>(p, p_row, v, v_row, depth, rescale, o, o_row);
  }
};
// Scores of kRows queries with kLanes unpacked keys, of which the first `keys` exist.
template <class T>
struct DirectScoreTile {
  const float* q;
  int64_t dim;
  const T* k;
  int64_t k_row, keys;
  float* scores;
  int64_t scores_row;
  template <int kRows, int kVecs>
  void run() const {
    Vec dots[kRows][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      Vec sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = zero();
      for (int64_t d = 0; i < keys && d < dim; d += kLanes) {
        const Vec key = load(k + i * k_row + d);
        for (int r = 0; r < kRows; ++r) sum[r] = fma(key, load(q + r * dim + d), sum[r]);
      }
      for (int r = 0; r < kRows; ++r) dots[r][i] = sum[r];
    }
    for (int r = 0; r < kRows; ++r) {
      transpose(dots[r]);
      Vec sum = dots[r][0];
      for (int i = 1; i < kLanes; ++i) sum = sum + dots[r][i];
      store(scores + r * scores_row, sum);
    }
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
  const bool cosine_ = a_.similarity == Similarity::cosine;
  const bool distance_ = a_.similarity >= Similarity::euclidean;
  const bool masked_ = a_.mask_kind != MaskKind::none;
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
  void make_row(int64_t batch, int64_t kv_head, int64_t flat, Row& r) const {
    // Queries of one position lie together, so that a block sees the narrowest range of keys.
    r.head = kv_head * group_ + flat % group_;
    r.index = flat / group_;
    const int64_t length = a_.key_lengths ? a_.key_lengths[batch] : a_.k_len;
    r.position = r.index + (a_.causal_lower_right ? length - a_.q_len : 0);
    r.lo = a_.window_left < 0 ? 0 : larger(0, r.position - a_.window_left);
    r.hi = length;
    if (a_.is_causal) r.hi = smaller(r.hi, r.position + 1);
    if (a_.window_right >= 0) r.hi = smaller(r.hi, r.position + a_.window_right + 1);
    r.hi = larger(r.hi, 0);
    r.lo = smaller(r.lo, r.hi);
    r.factor = a_.scale * (a_.temperature ? a_.temperature[r.head] : 1.0f);
    if (a_.softcap == 0.0f) r.factor *= kLog2e;
    r.slope = a_.alibi_slopes ? a_.alibi_slopes[batch * a_.heads + r.head] * kLog2e : 0.0f;
    const T* q = query(batch, r);
    if (cosine_) r.factor *= reciprocal_norm(q, a_.head_dim);
    r.norm = distance_ ? squared_norm(q, a_.head_dim) : 0.0f;
    r.mask = nullptr;
    if (masked_) {
      const int64_t at = a_.mask.batch[batch] + r.head * a_.mask.head + r.index * a_.mask.row;
      r.mask = static_cast<const uint8_t*>(a_.mask.data) + at * mask_bytes();
    }
    r.m = -kInf;
    r.l = 0.0f;
  }

  const T* query(int64_t batch, const Row& r) const {
    return static_cast<const T*>(a_.q.data) + a_.q.batch[batch] + r.head * a_.q.head +
           r.index * a_.q.row;
  }
  int64_t mask_bytes() const {
    return a_.mask_kind == MaskKind::boolean ? 1 : a_.mask_kind == MaskKind::f32 ? 4 : 2;
  }

  void run_task(int64_t unit, int64_t chunk) {
    const int64_t split = unit % call_.splits, kv_head = unit / call_.splits % a_.kv_heads;
    const int64_t batch = unit / call_.splits / a_.kv_heads;
    const int64_t first = chunk * chunk_, n = smaller(chunk_, rows_ - first);
    const size_t bytes = Buffers<Dot>(nullptr, n, keys_, words_, padded_).bytes;
    const Buffers<Dot> b(static_cast<char*>(thread_scratch(bytes)), n, keys_, words_, padded_);

    const T* keys = static_cast<const T*>(a_.k.data) + a_.k.batch[batch] + kv_head * a_.k.head;
    const T* values = static_cast<const T*>(a_.v.data) + a_.v.batch[batch] + kv_head * a_.v.head;
    // Rows of a transposed projection lie far apart: ask for all before the first is waited for.
    for (int64_t h = 0; h < group_; ++h) {
      const T* q =
          static_cast<const T*>(a_.q.data) + a_.q.batch[batch] + (kv_head * group_ + h) * a_.q.head;
      fetch_rows<true>(q + first / group_ * a_.q.row, a_.q.row, (n + group_ - 1) / group_,
                       a_.head_dim);
    }
    if (!direct_ && n == rows_) {  // one chunk: its first block of keys starts at or near 0
      fetch_rows<true>(keys, a_.k.row, smaller(keys_, a_.k_len), a_.head_dim);
      fetch_rows<true>(values, a_.v.row, smaller(keys_, a_.k_len), a_.value_dim);
    }

    int64_t lo = a_.k_len, hi = 0;
    for (int64_t i = 0; i < n; ++i) {
      make_row(batch, kv_head, first + i, b.rows[i]);
      pack_row<Dot>(query(batch, b.rows[i]), a_.head_dim, b.q + i * words_, words_);
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
      if (cosine_ || distance_) {
        for (int64_t i = 0; i < count; ++i) {
          const T* row = k + i * a_.k.row;
          b.key_norms[i] =
              cosine_ ? reciprocal_norm(row, a_.head_dim) : squared_norm(row, a_.head_dim);
        }
      }
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
    }
    for (int64_t i = 0; i < n; ++i) {
      if (call_.splits == 1) {
        finish(batch, b.rows[i], b.o + i * padded_);
      } else {
        float* to = partial(batch * a_.kv_heads + kv_head, split, first + i);
        memcpy(to, b.o + i * padded_, a_.value_dim * sizeof(float));
        to[a_.value_dim] = b.rows[i].m;
        to[a_.value_dim + 1] = b.rows[i].l;
      }
    }
  }

  // Rows [first, first + n) of the task against keys [j, j + count).
  void run_block(const Buffers<Dot>& b, int64_t first, int64_t n, int64_t j, int64_t count,
                 const T* k, const T* v, bool direct, int64_t bads) {
    struct Range {
      int64_t lo, hi;
    } range[kBlockRows / kTileRows];
    const int64_t tiles = (n + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      range[t] = {count, 0};
      for (int64_t i = t * kTileRows; i < smaller(n, (t + 1) * kTileRows); ++i) {
        const Row& r = b.rows[first + i];
        const int64_t lo = larger(r.lo - j, 0), hi = smaller(r.hi - j, count);
        if (lo < hi) range[t] = {smaller(range[t].lo, lo), larger(range[t].hi, hi)};
      }
      range[t].lo = range[t].lo / kLanes * kLanes;
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
                  ScoreTile<Dot>{q, words_, b.k + panel * words_, scores + panel, keys_});
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
    float factor = r.factor;
    const bool plain = !cosine_ && !distance_ && !masked_ && a_.softcap == 0.0f &&
                       !a_.alibi_slopes && factor > 0.0f && factor < kInf;
    if (!plain) {
      transform_row(b, r, q, s, lo, end, j);
      factor = 1.0f;
    }
    if (r.lo - j > lo || r.hi - j < end) hide_edges(s, lo, end, r.lo - j, r.hi - j);

    Vec top0 = set1(-kInf), top1 = top0;
    int64_t i = lo;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      top0 = max(top0, load(s + i));
      top1 = max(top1, load(s + i + kLanes));
    }
    if (i < end) top0 = max(top0, load(s + i));
    const float top = reduce_max(max(top0, top1)) * factor;
    const float m = top > r.m ? top : r.m;
    const float shift = m == -kInf ? 0.0f : m;  // nothing visible yet: weights 2^-inf = 0
    const float rescale = r.m == -kInf ? 0.0f
                          : r.m == m   ? 1.0f
                                       : first_lane(exp2(set1(r.m - shift)));
    r.m = m;

    Vec sum = zero();
    for (i = lo; i < end; i += kLanes) {
      const Vec weight = exp2(fma(load(s + i), set1(factor), set1(-shift)));
      sum = sum + weight;
      store_weight(p, i, weight);
    }
    r.l = r.l * rescale + reduce_add(sum);
    return rescale;
  }

  static void store_weight(float* p, int64_t i, Vec weight) { store(p + i, weight); }
  static void store_weight(uint32_t* p, int64_t i, Vec weight) {
    store(reinterpret_cast<bf16*>(p) + i, weight);
  }

  static void hide_edges(float* s, int64_t lo, int64_t end, int64_t first, int64_t last) {
    for (int64_t i = lo; i < end; i += kLanes) {
      if (i >= first && i + kLanes <= last) continue;
      const Vec at = iota();  // lanes are compared as small numbers, exact in float32
      const Mask seen = ~less(at, set1(float(first - i))) & less(at, set1(float(last - i)));
      store(s + i, select(seen, load(s + i), set1(-kInf)));
    }
  }

  // Similarity, temperature, soft cap, ALiBi and mask: dot products -> scores in log2 units.
  void transform_row(const Buffers<Dot>& b, const Row& r, const Word* q, float* s, int64_t lo,
                     int64_t end, int64_t j) {
    if (distance_) {
      measure_distances(b, r, q, s, lo, end);
    } else if (cosine_) {
      for (int64_t i = lo; i < end; i += kLanes) {
        store(s + i, load(s + i) * (load(b.key_norms + i) * set1(r.factor)));
      }
    } else {
      for (int64_t i = lo; i < end; i += kLanes) store(s + i, load(s + i) * set1(r.factor));
    }
    if (a_.softcap != 0.0f) {
      const Vec inverse = set1(1.0f / a_.softcap), cap = set1(a_.softcap * kLog2e);
      for (int64_t i = lo; i < end; i += kLanes) store(s + i, tanh(load(s + i) * inverse) * cap);
    }
    if (a_.alibi_slopes) {
      for (int64_t i = lo; i < end; i += kLanes) {
        const Vec distance = abs(iota() + set1(float(j + i - r.position)));
        store(s + i, fnma(set1(r.slope), distance, load(s + i)));
      }
    }
    const int64_t left = a_.k_len - j;  // mask columns that exist from here
    switch (a_.mask_kind) {
      case MaskKind::none: break;
      case MaskKind::boolean: mask_row(r.mask + j * a_.mask.col, s, lo, smaller(end, left)); break;
      case MaskKind::f32:
        bias_row(reinterpret_cast<const float*>(r.mask) + j * a_.mask.col, s, lo,
                 smaller(end, left));
        break;
      case MaskKind::bf16:
        bias_row(reinterpret_cast<const bf16*>(r.mask) + j * a_.mask.col, s, lo,
                 smaller(end, left));
        break;
      case MaskKind::f16:
        bias_row(reinterpret_cast<const f16*>(r.mask) + j * a_.mask.col, s, lo, smaller(end, left));
        break;
    }
  }

  void mask_row(const uint8_t* mask, float* s, int64_t lo, int64_t end) const {
    for (int64_t i = lo; i < end; i += kLanes) {
      const int n = int(smaller(end - i, kLanes));
      Mask seen;
      if (a_.mask.col == 1) {
        seen = load_mask_n(mask + i, n);
      } else {
        uint8_t lanes[kLanes];
        for (int l = 0; l < kLanes; ++l) lanes[l] = l < n ? mask[(i + l) * a_.mask.col] : 0;
        seen = load_mask(lanes);
      }
      store(s + i, select(seen, load(s + i), set1(-kInf)));
    }
  }

  // A bias of minus infinity hides a key whatever its score, a NaN score included.
  template <class M>
  void bias_row(const M* mask, float* s, int64_t lo, int64_t end) const {
    for (int64_t i = lo; i < end; i += kLanes) {
      const int n = int(smaller(end - i, kLanes));
      Vec bias;
      if (a_.mask.col == 1) {
        bias = load_n(mask + i, n);
      } else {
        float lanes[kLanes];
        for (int l = 0; l < kLanes; ++l)
          lanes[l] = l < n ? to_float(mask[(i + l) * a_.mask.col]) : 0.0f;
        bias = load(lanes);
      }
      const Mask hidden = equal(bias, set1(-kInf));
      store(s + i, select(hidden, set1(-kInf), fma(bias, set1(kLog2e), load(s + i))));
    }
  }

  // |q - k|^2 = |q|^2 + |k|^2 - 2 q.k, except where that loses more than 4 bits: there, element by
  // element.
  void measure_distances(const Buffers<Dot>& b, const Row& r, const Word* q, float* s, int64_t lo,
                         int64_t end) {
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec both = set1(r.norm) + load(b.key_norms + i);
      const Vec square = max(zero(), fma(set1(-2.0f), load(s + i), both));
      store(s + i, square);
      if (!any(less(square, both * set1(1.0f / 16)))) continue;
      float sums[kLanes];
      store(sums, both);
      for (int l = 0; l < kLanes; ++l) {
        if (s[i + l] < sums[l] / 16) s[i + l] = distance2(q, panel_of(b, i + l));
      }
    }
    const bool root = a_.similarity == Similarity::euclidean;
    for (int64_t i = lo; i < end; i += kLanes) {
      const Vec d = load(s + i);
      store(s + i, (root ? sqrt(d) : d) * set1(-r.factor));
    }
  }

  const Word* panel_of(const Buffers<Dot>& b, int64_t key) const {
    return b.k + key / kPanel * kPanel * words_ + key % kPanel;
  }

  float distance2(const Word* q, const Word* k) const {
    float sum = 0.0f;
    for (int64_t d = 0; d < a_.head_dim; ++d) {
      const float difference = word_element(q, 1, d) - word_element(k, kPanel, d);
      sum += difference * difference;
    }
    return sum;
  }

  float* partial(int64_t unit, int64_t split, int64_t row) const {
    return call_.partials + ((unit * call_.splits + split) * rows_ + row) * (a_.value_dim + 2);
  }

  void merge_splits(int64_t unit) {
    float* o = static_cast<float*>(thread_scratch(padded_ * sizeof(float)));
    for (int64_t i = 0; i < rows_; ++i) {
      Row r;
      make_row(unit / a_.kv_heads, unit % a_.kv_heads, i, r);
      memset(o, 0, padded_ * sizeof(float));
      for (int64_t split = 0; split < call_.splits; ++split) {
        const float* from = partial(unit, split, i);
        const float m = from[a_.value_dim], top = m > r.m ? m : r.m,
                    shift = top == -kInf ? 0.0f : top;
        const float mine = exp2f(r.m - shift), its = exp2f(m - shift);
        for (int64_t d = 0; d < a_.value_dim; ++d) o[d] = o[d] * mine + from[d] * its;
        r.l = r.l * mine + from[a_.value_dim + 1] * its;
        r.m = top;
      }
      finish(unit / a_.kv_heads, r, o);
    }
  }

  void finish(int64_t batch, Row& r, const float* o) {
    if (a_.sinks) {  // one more score, with no value
      const float sink = a_.sinks[r.head] * kLog2e;
      const float m = sink > r.m ? sink : r.m;
      if (m > -kInf) {
        const float mine = exp2f(r.m - m);
        r.l = r.l * mine + exp2f(sink - m);
        r.m = m;
        write(batch, r, o, r.l == 0.0f ? 0.0f : mine / r.l);
        return;
      }
    }
    write(batch, r, o, r.l == 0.0f ? 0.0f : 1.0f / r.l);
  }

  void write(int64_t batch, const Row& r, const float* o, float factor) {
    T* out = static_cast<T*>(a_.out.data) + a_.out.batch[batch] + r.head * a_.out.head +
             r.index * a_.out.row;
    for (int64_t d = 0; d < a_.value_dim; d += kLanes) {
      store_n(out + d, load(o + d) * set1(factor), int(smaller(a_.value_dim - d, kLanes)));
    }
    const float lse = r.l == 0.0f ? -kInf : (r.m + log2f(r.l)) * kLn2;
    a_.lse[(batch * a_.heads + r.head) * a_.q_len + r.index] = lse;
  }
};

}  // namespace

void attention(const AttentionCall& call) {
  const AttentionArgs& a = *call.args;
  const int64_t rows = a.heads / a.kv_heads * a.q_len;
  const bool direct = rows <= kDirectTiles * kTileRows && a.head_dim % kLanes == 0 &&
                      a.value_dim % kLanes == 0 && a.similarity <= Similarity::cosine;
  switch (a.dtype) {
    case Dtype::f32: return Attention<float, F32Dot>(call, direct).run();
    case Dtype::f16: return Attention<f16, F32Dot>(call, direct).run();
    case Dtype::bf16:
#if defined(__AVX512BF16__)
      if (!direct) return Attention<bf16, Bf16Dot>(call, false).run();
#endif
      return Attention<bf16, F32Dot>(call, direct).run();
  }
}

}  // namespace mmkern::MMKERN_ISA
