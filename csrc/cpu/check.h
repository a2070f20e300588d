// What the border of every operator asks of its arguments before a kernel reads memory. A compiled
// graph, an exported program, a C++ caller and torch.ops come here without passing mmkern/ops.
// Some 15 ns a tensor: metadata is read, never an element.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/tensor.h"

namespace mmkern {

// Raises what Python sees as a ValueError: "name: what was wrong".
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const char* name, const Parts&... parts) {
  std::ostringstream text;
  text << name << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// A dense tensor on the CPU, whose storage holds all of its elements: it may have been freed, or
// be too small for the sizes and strides. The conditions return the tensor, so that they chain.
class Checked {
 public:
  Checked(const Tensor& t, const char* name);

  const char* name;
  int64_t rank;
  const int64_t *sizes, *strides;
  ScalarType type;

  int64_t size(int64_t back) const { return sizes[rank - back]; }  // 1: of the last dim
  const Checked& ranked(int64_t least, int64_t most = 64) const {
    if (rank < least || rank > most) refuse_rank(least, most);
    return *this;
  }
  // Any dtype that kernels compute in, or just `want`.
  const Checked& floating() const {
    if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half) {
      refuse_type("float32, bfloat16 or float16");
    }
    return *this;
  }
  const Checked& typed(ScalarType want) const {
    if (type != want) refuse_type(want);
    return *this;
  }
  // The first `count` sizes of another tensor, then `tail`, and nothing more.
  const Checked& shaped(const Checked& other, int64_t count,
                        std::initializer_list<int64_t> tail = {}) const {
    bool same = rank == count + int64_t(tail.size());
    for (int64_t d = 0; same && d < count; ++d) same = sizes[d] == other.sizes[d];
    const int64_t* want = tail.begin();
    for (int64_t d = count; same && d < rank; ++d) same = sizes[d] == *want++;
    if (!same) refuse_shape(other, count, tail);
    return *this;
  }
  const Checked& shaped(std::initializer_list<int64_t> want) const {
    return shaped(*this, 0, want);
  }
  const Checked& like(const Checked& other) const {
    return shaped(other, other.rank).typed(other.type);
  }
  // A shape that broadcasts to that of `other`; with `full`, of as many dims.
  const Checked& broadcasts(const Checked& other, bool full = false) const {
    const int64_t missing = other.rank - rank;
    bool fits = full ? missing == 0 : missing >= 0;
    for (int64_t d = 0; fits && d < rank; ++d) {
      fits = sizes[d] == 1 || sizes[d] == other.sizes[d + missing];
    }
    if (!fits) refuse_broadcast(other, full);
    return *this;
  }
  // Memory that a kernel may write: no element lies there twice.
  const Checked& writable() const {
    for (int64_t d = 0; d < rank; ++d) {
      if (strides[d] == 0 && sizes[d] > 1) refuse(name, "a stride of 0 holds elements twice");
    }
    return *this;
  }

 private:
  [[noreturn, gnu::cold]] void refuse_rank(int64_t least, int64_t most) const;
  [[noreturn, gnu::cold]] void refuse_type(const char* want) const;
  [[noreturn, gnu::cold]] void refuse_type(ScalarType want) const;
  [[noreturn, gnu::cold]] void refuse_shape(const Checked& other, int64_t count,
                                            std::initializer_list<int64_t> tail) const;
  [[noreturn, gnu::cold]] void refuse_broadcast(const Checked& other, bool full) const;
};

// `low` <= value <= `high`; false for NaN.
template <class N>
inline void check_range(const char* name, N value, N low, N high) {
  if (!(value >= low && value <= high)) {
    refuse(name, "expected a value in [", low, ", ", high, "], got ", value);
  }
}

// A dim of x, counted from the front.
inline void check_dim(int64_t dim, const Checked& x) {
  check_range<int64_t>("dim", dim, 0, x.ranked(1).rank - 1);
}

// A probability, and the seed that it needs: one int64.
void check_dropout(double dropout_p, const std::optional<Tensor>& seed);

// Bits of `wanted`, in the order of the results, for which there is nothing: `possible` are those
// that may be set.
void check_wanted(int64_t wanted, int64_t possible);

// A product of sizes, of a buffer to be allocated.
inline int64_t product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t n : sizes) {
    if (__builtin_mul_overflow(total, n, &total)) refuse(name, "more than 2^63 elements");
  }
  return total;
}

}  // namespace mmkern
