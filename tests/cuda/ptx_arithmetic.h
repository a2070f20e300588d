// Arithmetic, logic, comparison and conversion: everything that touches registers alone.
#pragma once
#include <cmath>
#include <limits>

#include "ptx_decode.h"

namespace ptx {

inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}

// Functions of one, two or three operands of type T; Op has no state.
template <class T, class Op>
void set_run(Decoding& d, Op, size_t inputs) {
  d.plain(inputs + 1);
  d.i.run = [](Frame& f, const Instruction& i) {
    auto in = [&](int n) {
      const T x = f.get<T>(i.a[n]);
      if constexpr (std::is_same_v<T, float>)
        return i.ftz ? flushed(x) : x;
      else
        return x;
    };
    constexpr Op op{};
    if constexpr (std::is_invocable_v<Op, T, T, T>)
      f.set(i.d[0], op(in(0), in(1), in(2)));
    else if constexpr (std::is_invocable_v<Op, T, T>)
      f.set(i.d[0], op(in(0), in(1)));
    else
      f.set(i.d[0], op(in(0)));
    if constexpr (std::is_same_v<T, float>)
      if (i.ftz) f.set(i.d[0], flushed(f.get<float>(i.d[0])));
  };
}
// Two floats in a register of 64 bits, sm_100 and up.
template <class Op>
void set_run_twice(Decoding& d, Op, size_t inputs) {
  d.plain(inputs + 1);
  d.i.run = [](Frame& f, const Instruction& i) {
    uint64_t both = 0;
    for (int h = 0; h < 2; ++h) {
      auto in = [&](int n) { return bits_as<float>(uint32_t(f.r[i.a[n]] >> (32 * h))); };
      constexpr Op op{};
      float x;
      if constexpr (std::is_invocable_v<Op, float, float, float>)
        x = op(in(0), in(1), in(2));
      else
        x = op(in(0), in(1));
      both |= uint64_t(bits_as<uint32_t>(x)) << (32 * h);
    }
    f.set(i.d[0], both);
  };
}

// f16, bf16 and pairs of them: in double, rounded once.
template <class T, int kCount, class Op>
void set_run_halves(Decoding& d, Op, size_t inputs) {
  d.plain(inputs + 1);
  d.i.run = [](Frame& f, const Instruction& i) {
    uint32_t all = 0;
    for (int h = 0; h < kCount; ++h) {
      auto in = [&](int n) { return double(emulator::half_of<T>(f.get<uint32_t>(i.a[n]), h)); };
      constexpr Op op{};
      double x;
      if constexpr (std::is_invocable_v<Op, double, double, double>)
        x = op(in(0), in(1), in(2));
      else
        x = op(in(0), in(1));
      all |= uint32_t(emulator::rounded<T>(float(x)).bits) << (16 * h);
    }
    f.set(i.d[0], all);
  };
}

// add sub mul div fma: [.rn][.ftz].f32, .rn.f32x2, .f64, [.rn] 16-bit floats, and integers through
// `whole`.
template <class Float, class Whole>
void arithmetic(Dots& dots, Decoding& d, size_t inputs, Float op, Whole whole) {
  const bool nearest = dots.take("rn");
  d.i.ftz = dots.take("ftz");
  const std::string type = dots.next();
  dots.end();
  if (type == "f32")
    set_run<float>(d, op, inputs);
  else if (type == "f64" && !d.i.ftz)
    set_run<double>(d, op, inputs);
  else if (type == "f32x2" && !d.i.ftz)
    set_run_twice(d, op, inputs);
  else if (type == "f16" && !d.i.ftz)
    set_run_halves<f16, 1>(d, op, inputs);
  else if (type == "bf16" && !d.i.ftz)
    set_run_halves<bf16, 1>(d, op, inputs);
  else if (type == "f16x2" && !d.i.ftz)
    set_run_halves<f16, 2>(d, op, inputs);
  else if (type == "bf16x2" && !d.i.ftz)
    set_run_halves<bf16, 2>(d, op, inputs);
  else if (nearest || d.i.ftz)
    refuse(dots.statement, "type ." + type);
  else
    whole(type);
}
inline auto no_integers(Dots& dots) {
  return [&](const std::string& type) { refuse(dots.statement, "type ." + type); };
}

// Wrapping integer arithmetic, in unsigned so that C++ allows it.
template <class T, class Op>
struct Wrapping {
  T operator()(T a, T b) const { return T(Op{}(uint64_t(a), uint64_t(b))); }
};

template <class T>
T nan_or(T a, T b, T result) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : result;
}

inline void decode_min_max(Dots& dots, Decoding& d) {
  const bool low = dots.name() == "min", relu = dots.take("relu");
  d.i.ftz = !relu && dots.take("ftz");
  const bool nan = !relu && dots.take("NaN");
  const std::string type = dots.next();
  dots.end();
  if (type == "f32" && !relu) {
    const bool three = d.s.operands.size() == 4;  // sm_100 and up
    auto plain = [](auto op, auto op3) { return std::make_pair(op, op3); };
    auto use = [&](auto pair) {
      three ? set_run<float>(d, pair.second, 3) : set_run<float>(d, pair.first, 2);
    };
    // fmin of plus and minus zero may be either; the hardware orders them.
    if (low && nan)
      use(plain([](float a, float b) { return nan_or(a, b, std::fmin(a, b)); },
                [](float a, float b, float c) {
                  return nan_or(a + b, c, std::fmin(std::fmin(a, b), c));
                }));
    else if (low)
      use(plain([](float a, float b) { return std::fmin(a, b); },
                [](float a, float b, float c) { return std::fmin(std::fmin(a, b), c); }));
    else if (nan)
      use(plain([](float a, float b) { return nan_or(a, b, std::fmax(a, b)); },
                [](float a, float b, float c) {
                  return nan_or(nan_or(a, b, a), c, std::fmax(std::fmax(a, b), c));
                }));
    else
      use(plain([](float a, float b) { return std::fmax(a, b); },
                [](float a, float b, float c) { return std::fmax(std::fmax(a, b), c); }));
    return;
  }
  if (d.i.ftz || nan) refuse(dots.statement, "type ." + type);
  if (relu && type != "s32") refuse(dots.statement, "relu of ." + type);
  if (relu && low)
    return set_run<int32_t>(d, [](int32_t a, int32_t b) { return std::max(std::min(a, b), 0); }, 2);
  if (relu)
    return set_run<int32_t>(d, [](int32_t a, int32_t b) { return std::max(std::max(a, b), 0); }, 2);
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    low ? set_run<T>(
              d, [](T a, T b) { return std::min(a, b); }, 2)
        : set_run<T>(d, [](T a, T b) { return std::max(a, b); }, 2);
  });
}

// mul and mad: .lo, .hi and .wide of integers, else floats.
inline void decode_multiply(Dots& dots, Decoding& d) {
  const bool add = dots.name() == "mad";
  const bool low = dots.take("lo"), high = !low && dots.take("hi"),
             wide = !low && !high && dots.take("wide");
  if (!low && !high && !wide) {
    if (add) refuse(dots.statement, "mad of floats");
    return arithmetic(dots, d, 2, [](auto a, auto b) { return a * b; }, no_integers(dots));
  }
  const std::string type = dots.next();
  dots.end();
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    if (wide && sizeof(T) == 8) refuse(dots.statement, "type ." + type);
    d.plain(add ? 4 : 3);
    d.i.n = low ? 0 : high ? int(sizeof(T) * 8) : -1;
    d.i.m = add;
    d.i.run = [](Frame& f, const Instruction& i) {
      const Wide product = Wide(f.get<T>(i.a[0])) * f.get<T>(i.a[1]);
      if (i.n >= 0)
        return f.set(i.d[0],
                     T(uint64_t(T(product >> i.n)) + (i.m ? uint64_t(f.get<T>(i.a[2])) : 0)));
      const uint64_t sum = uint64_t(product) + (i.m ? f.r[i.a[2]] : 0);
      sizeof(T) == 4 ? f.set(i.d[0], sum) : f.set(i.d[0], uint32_t(sum));
    };
  });
}

inline void decode_divide(Dots& dots, Decoding& d) {
  if (dots.take("full") || dots.take("approx")) {
    d.i.ftz = dots.take("ftz");
    dots.want("f32");
    dots.end();
    return set_run<float>(d, [](float a, float b) { return a / b; }, 2);
  }
  arithmetic(
      dots, d, 2, [](auto a, auto b) { return a / b; },
      [&](const std::string& type) {
        integer_type(dots, type, [&](auto tag) {
          using T = decltype(tag);
          set_run<T>(
              d, [](T a, T b) { return b ? T(a / b) : T(-1); },
              2);  // the hardware's answer to a zero is all ones
        });
      });
}
inline void decode_remainder(Dots& dots, Decoding& d) {
  const std::string type = dots.next();
  dots.end();
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    set_run<T>(d, [](T a, T b) { return b ? T(a % b) : a; }, 2);
  });
}

inline void decode_sign(Dots& dots, Decoding& d) {
  const bool negate = dots.name() == "neg";
  d.i.ftz = dots.take("ftz");
  const std::string type = dots.next();
  dots.end();
  if (type == "f32") {
    return negate ? set_run<float>(
                        d, [](float x) { return -x; }, 1)
                  : set_run<float>(d, [](float x) { return std::fabs(x); }, 1);
  }
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    if (!std::is_signed_v<T> || d.i.ftz) refuse(dots.statement, "type ." + type);
    negate ? set_run<T>(
                 d, [](T x) { return T(0 - uint64_t(x)); }, 1)
           : set_run<T>(d, [](T x) { return T(x < 0 ? 0 - uint64_t(x) : uint64_t(x)); }, 1);
  });
}

// Approximations are computed exactly here: what they lose must fit into a test's tolerance.
inline void decode_special(Dots& dots, Decoding& d) {
  const std::string name = dots.name();
  const bool approx = dots.take("approx");
  if (!approx &&
      (name == "ex2" || name == "lg2" || name == "tanh" || name == "sin" || name == "cos"))
    refuse(dots.statement, "expected .approx");
  if (!approx) dots.want("rn");
  d.i.ftz = dots.take("ftz");
  dots.want("f32");
  dots.end();
  if (name == "ex2") return set_run<float>(d, [](float x) { return std::exp2(x); }, 1);
  if (name == "lg2") return set_run<float>(d, [](float x) { return std::log2(x); }, 1);
  if (name == "rcp") return set_run<float>(d, [](float x) { return 1.f / x; }, 1);
  if (name == "sqrt") return set_run<float>(d, [](float x) { return std::sqrt(x); }, 1);
  if (name == "rsqrt")
    return set_run<float>(d, [](float x) { return float(1 / std::sqrt(double(x))); }, 1);
  if (name == "tanh") return set_run<float>(d, [](float x) { return std::tanh(x); }, 1);
  if (name == "sin") return set_run<float>(d, [](float x) { return std::sin(x); }, 1);
  set_run<float>(d, [](float x) { return std::cos(x); }, 1);
}

inline const Decoders& arithmetic_decoders() {
  static const Decoders all = {
      {"add",
       [](Dots& dots, Decoding& d) {
         arithmetic(
             dots, d, 2, [](auto a, auto b) { return a + b; },
             [&](const std::string& type) {
               integer_type(dots, type, [&](auto tag) {
                 set_run<decltype(tag)>(d, Wrapping<decltype(tag), std::plus<uint64_t>>{}, 2);
               });
             });
       }},
      {"sub",
       [](Dots& dots, Decoding& d) {
         arithmetic(
             dots, d, 2, [](auto a, auto b) { return a - b; },
             [&](const std::string& type) {
               integer_type(dots, type, [&](auto tag) {
                 set_run<decltype(tag)>(d, Wrapping<decltype(tag), std::minus<uint64_t>>{}, 2);
               });
             });
       }},
      {"fma",
       [](Dots& dots, Decoding& d) {
         arithmetic(
             dots, d, 3, [](auto a, auto b, auto c) { return std::fma(a, b, c); },
             no_integers(dots));
       }},
      {"mul", decode_multiply},
      {"mad", decode_multiply},
      {"div", decode_divide},
      {"rem", decode_remainder},
      {"min", decode_min_max},
      {"max", decode_min_max},
      {"neg", decode_sign},
      {"abs", decode_sign},
      {"ex2", decode_special},
      {"lg2", decode_special},
      {"rcp", decode_special},
      {"sqrt", decode_special},
      {"rsqrt", decode_special},
      {"tanh", decode_special},
      {"sin", decode_special},
      {"cos", decode_special},
  };
  return all;
}

}  // namespace ptx
