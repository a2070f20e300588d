// The CPU kernels without torch, each instruction set in turn, against the formula in double: a
// program for an emulator, in which Python would be too slow. Prints a line for each case and ends
// with status 1 if one is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention/backward.h"
#include "cpu/loss/cross_entropy.h"
#include "cpu/parallel.h"
#include "cpu/position/rotary.h"
#include "cpu/position/turns.h"
#include "cpu/softmax/args.h"

namespace mmkern {

// Threads are torch's: here, one.
int64_t num_threads() { return 1; }
void run_tasks(int64_t tasks, void (*fn)(void*, int64_t), void* context, size_t) {
  for (int64_t task = 0; task < tasks; ++task) fn(context, task);
}
void await_turn(const int32_t* turn, int32_t value) {
  if (*turn != value) abort();  // one thread would wait for ever
}
void pass_turn(int32_t* turn, int32_t next) { *turn = next; }
void* thread_scratch(size_t bytes) {
  static std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) &
                                 ~uintptr_t{63});
}

}  // namespace mmkern

namespace {

using namespace mmkern;

bool right = true;
std::mt19937 generator(0);

double widened(const char* p, Dtype dtype, size_t i) {
  uint16_t half;
  if (dtype == Dtype::f32) {
    float x;
    return memcpy(&x, p + 4 * i, 4), x;
  }
  memcpy(&half, p + 2 * i, 2);
  if (dtype == Dtype::bf16) {
    const uint32_t bits = uint32_t{half} << 16;
    float x;
    return memcpy(&x, &bits, 4), x;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double x =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return half >> 15 ? -x : x;
}

// Numbers in one of the dtypes, and the same in double.
struct Tensor {
  Dtype dtype;
  std::vector<char> bytes;
  std::vector<double> exact;
  Tensor(Dtype type, size_t count, bool random = true) : dtype(type), exact(count) {
    bytes.assign(count * (type == Dtype::f32 ? 4 : 2) + 64, 0);  // 64: vectors may be read past it
    std::normal_distribution<float> normal;
    for (size_t i = 0; random && i < count; ++i) {
      const float x = normal(generator);
      uint32_t bits;
      memcpy(&bits, &x, 4);
      if (type == Dtype::f32) memcpy(&bytes[4 * i], &x, 4);
      uint16_t half = uint16_t(bits >> 16);
      if (type == Dtype::f16)
        half = uint16_t((bits >> 16 & 0x8000) | (0x3000 + (bits >> 13 & 0xfff)));
      if (type != Dtype::f32) memcpy(&bytes[2 * i], &half, 2);
    }
    for (size_t i = 0; i < count; ++i) exact[i] = widened(bytes.data(), type, i);
  }
  void* data() { return bytes.data(); }
};

// The relative L2 error, and its limit of mmkern.testing.
void check(const std::string& name, Tensor& actual, const std::vector<double>& exact,
           bool gradient = false) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = widened(actual.bytes.data(), actual.dtype, i) - exact[i];
    error += difference * difference, size += exact[i] * exact[i];
  }
  const double limits[] = {1e-6, 5e-3, 1e-3}, gradients[] = {1e-5, 1e-2, 2e-3};
  const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  const double relative = std::sqrt(error / size),
               limit = (gradient ? gradients : limits)[int(actual.dtype)];
  const bool good = relative <= limit;  // false for NaN
  right &= good;
  printf("%-5s %-26s %-8s %-9s error %.2g, limit %.0e\n", good ? "ok" : "WRONG", name.c_str(),
         dtypes[int(actual.dtype)], isa_name(current_isa), relative, limit);
}

std::vector<double> softmax_of(const std::vector<double>& x, int64_t cols) {
  std::vector<double> out(x.size());
  for (size_t row = 0; row < x.size(); row += cols) {
    double top = -INFINITY, sum = 0.0;
    for (int64_t c = 0; c < cols; ++c) top = std::max(top, x[row + c]);
    for (int64_t c = 0; c < cols; ++c) sum += out[row + c] = std::exp(x[row + c] - top);
    for (int64_t c = 0; c < cols; ++c) out[row + c] /= sum;
  }
  return out;
}

void softmax_rows(Dtype dtype, int64_t rows, int64_t cols) {
  Tensor x(dtype, rows * cols), out(dtype, rows * cols, false);
  SoftmaxArgs a{};
  a.kind = SoftmaxKind::softmax, a.dtype = dtype, a.cols = cols, a.inner = 1, a.scale = 1.0f;
  const int64_t sizes[] = {rows}, strides[] = {cols};
  a.outer_dims = 1, a.outer_sizes = sizes;
  a.x = {x.data(), strides, 1, 0}, a.out = {out.data(), strides, 1, 0};
  softmax(a);
  check("softmax " + std::to_string(cols), out, softmax_of(x.exact, cols));
}

void rotary_rows(Dtype dtype, bool interleaved) {
  const int64_t length = 11, dim = 24, pairs = dim / 2;
  Tensor x(dtype, length * dim), out(dtype, length * dim, false);
  std::vector<uint64_t> turns(pairs + kMaxPadding);
  fill_turns(turns.data(), pairs, 1e4, 2.0 / double(dim));
  RotaryArgs a{};
  a.dtype = dtype, a.interleaved = interleaved, a.pairs = pairs, a.turns = turns.data();
  for (Rows* rows : {&a.q, &a.q_out}) {
    rows->batch = rows->heads = 1, rows->length = length, rows->dim = rows->stride_l = dim;
  }
  a.q.data = x.data(), a.q_out.data = out.data();
  rotate(a);
  std::vector<double> exact(length * dim);
  for (int64_t p = 0; p < length; ++p) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = double(p) * std::pow(1e4, -2.0 * double(i) / double(dim));
      const int64_t at = p * dim + (interleaved ? 2 * i : i), to = at + (interleaved ? 1 : pairs);
      exact[at] = x.exact[at] * std::cos(angle) - x.exact[to] * std::sin(angle);
      exact[to] = x.exact[to] * std::cos(angle) + x.exact[at] * std::sin(angle);
    }
  }
  check(interleaved ? "rotary interleaved" : "rotary half", out, exact);
}

void loss_rows(Dtype dtype) {
  const int64_t rows = 7, classes = 83;
  Tensor x(dtype, rows * classes), grad(dtype, rows * classes, false),
      loss(Dtype::f32, rows, false);
  std::vector<int64_t> target(rows);
  for (int64_t r = 0; r < rows; ++r) target[r] = r * 11 % classes;
  CrossEntropyArgs a{};
  a.dtype = a.soft_dtype = dtype, a.batch = rows, a.classes = classes, a.inner = 1;
  a.x = {x.data(), classes, 1, 1}, a.grad = {grad.data(), classes, 1, 1};
  a.target = target.data(), a.ignore_index = -100, a.weight_sum = float(classes), a.factor = 1.0f;
  a.loss = static_cast<float*>(loss.data());
  cross_entropy(a);
  std::vector<double> weights = softmax_of(x.exact, classes), exact(rows);
  for (int64_t r = 0; r < rows; ++r) {
    double& hit = weights[r * classes + target[r]];
    exact[r] = -std::log(hit);
    hit -= 1.0;
  }
  check("cross_entropy", loss, exact);
  check("cross_entropy gradient", grad, weights, true);
}

// Attention of two query heads on one key head, forward and backward.
void attention_heads(Dtype dtype, int64_t q_len, int64_t k_len, int64_t dim, bool causal) {
  const int64_t heads = 2, rows = heads * q_len;
  Tensor q(dtype, rows * dim), k(dtype, k_len * dim), v(dtype, k_len * dim),
      out(dtype, rows * dim, false);
  Tensor grad(dtype, rows * dim), gq(dtype, rows * dim, false), gk(dtype, k_len * dim, false),
      gv(gk);
  std::vector<float> lse(rows);
  const int64_t start[] = {0};
  const auto operand = [&](Tensor& t, int64_t length) {
    return Operand{t.data(), start, length * dim, dim, 1};
  };
  AttentionBackwardArgs g{};
  AttentionArgs& a = g.forward;
  a.dtype = dtype, a.batch = a.kv_heads = 1, a.heads = heads, a.q_len = q_len, a.k_len = k_len;
  a.head_dim = a.value_dim = dim, a.scale = 1.0 / std::sqrt(double(dim)), a.is_causal = causal;
  a.window_left = a.window_right = -1, a.lse = lse.data();
  a.q = operand(q, q_len), a.k = operand(k, k_len), a.v = operand(v, k_len),
  a.out = operand(out, q_len);
  attention(AttentionCall{&a, 1, nullptr});

  std::vector<double> scores(rows * k_len, -INFINITY), o(rows * dim), dq(rows * dim),
      dk(k_len * dim), dv(k_len * dim);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < (causal ? std::min(k_len, r % q_len + 1) : k_len); ++j) {
      double dot = 0.0;
      for (int64_t c = 0; c < dim; ++c) dot += q.exact[r * dim + c] * k.exact[j * dim + c];
      scores[r * k_len + j] = dot * a.scale;
    }
  }
  const std::vector<double> weights = softmax_of(scores, k_len);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> dp(k_len);
    double delta = 0.0;
    for (int64_t j = 0; j < k_len; ++j) {
      const double w = weights[r * k_len + j];
      for (int64_t c = 0; c < dim; ++c) {
        o[r * dim + c] += w * v.exact[j * dim + c];
        dv[j * dim + c] += w * grad.exact[r * dim + c];
        dp[j] += grad.exact[r * dim + c] * v.exact[j * dim + c];
      }
      delta += w * dp[j];
    }
    for (int64_t j = 0; j < k_len; ++j) {
      const double ds = weights[r * k_len + j] * (dp[j] - delta) * a.scale;
      for (int64_t c = 0; c < dim; ++c) {
        dq[r * dim + c] += ds * k.exact[j * dim + c], dk[j * dim + c] += ds * q.exact[r * dim + c];
      }
    }
  }
  const std::string name = "attention " + std::to_string(q_len) + "x" + std::to_string(k_len) +
                           (causal ? " causal" : "");
  check(name, out, o);

  g.grad_out = operand(grad, q_len), g.grad_q = operand(gq, q_len);
  g.grad_k = operand(gk, k_len), g.grad_v = operand(gv, k_len);
  g.block_keys = 256, g.key_blocks = 1, g.query_blocks = (rows + kBackwardRows - 1) / kBackwardRows;
  attention_backward(g);
  check(name + " dq", gq, dq, true);
  check(name + " dk", gk, dk, true);
  check(name + " dv", gv, dv, true);
}

}  // namespace

int main() {
  for (const Isa isa : kIsas) {
    if (!has_isa(isa)) continue;
    current_isa = isa;
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (const int64_t cols : {1, 3, 64, 131}) softmax_rows(dtype, 5, cols);
      for (const bool interleaved : {false, true}) rotary_rows(dtype, interleaved);
      loss_rows(dtype);
      attention_heads(dtype, 70, 93, 40, false);
      attention_heads(dtype, 33, 33, 20, true);
      attention_heads(dtype, 1, 200, 64, false);
    }
  }
  puts(right ? "all right" : "some are wrong");
  return right ? 0 : 1;
}
