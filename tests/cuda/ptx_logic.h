// Moves, logic, comparison and conversion.
#pragma once
#include "ptx_arithmetic.h"

namespace ptx {

inline int width_of(Dots& dots, const std::string& type) {  // bits; 1 for a predicate
  for (const char* kind : {"b", "u", "s", "f"})
    for (int bits : {16, 32, 64})
      if (type == kind + std::to_string(bits)) return bits;
  if (type == "pred") return 1;
  refuse(dots.statement, "type ." + type);
}
inline uint64_t mask_of(int bits) { return bits == 64 ? ~0ull : (1ull << bits) - 1; }

inline void decode_move(Dots& dots, Decoding& d) {
  const int bits = width_of(dots, dots.next());
  dots.end();
  d.refuse_operands(2);
  d.write_all(d.s.operands[0]);
  d.read_all(d.s.operands[1]);
  const int wide = int(std::max(d.i.d.size(), d.i.a.size()));
  if (d.i.d.size() > 1 && d.i.a.size() > 1) refuse(dots.statement, "two vectors");
  d.i.n = bits / wide, d.i.m = bits;
  if (bits == 1 && d.program.text.constants.count(d.i.a[0]))  // a predicate from a number
    d.i.run = [](Frame& f, const Instruction& i) { f.set<uint64_t>(i.d[0], f.r[i.a[0]] != 0); };
  else if (bits == 1)
    d.i.run = [](Frame& f, const Instruction& i) { f.set<uint64_t>(i.d[0], f.get<bool>(i.a[0])); };
  else if (d.i.a.size() > 1)
    d.i.run = [](Frame& f, const Instruction& i) {
      uint64_t v = 0;
      for (size_t k = 0; k < i.a.size(); ++k) v |= (f.r[i.a[k]] & mask_of(i.n)) << (k * i.n);
      f.set(i.d[0], v);
    };
  else
    d.i.run = [](Frame& f, const Instruction& i) {
      const uint64_t v = f.r[i.a[0]];
      for (size_t k = 0; k < i.d.size(); ++k) f.set(i.d[k], v >> (k * i.n) & mask_of(i.n));
    };
}

// and or xor not shl shr selp: bits of a width, or predicates.
template <class Op>
void bitwise(Dots& dots, Decoding& d, Op, size_t inputs) {
  d.i.n = width_of(dots, dots.next());
  dots.end();
  d.plain(inputs + 1);
  d.i.run = [](Frame& f, const Instruction& i) {
    auto in = [&](int k) { return i.n == 1 ? uint64_t(f.get<bool>(i.a[k])) : f.r[i.a[k]]; };
    constexpr Op op{};
    if constexpr (std::is_invocable_v<Op, uint64_t, uint64_t>)
      f.set(i.d[0], op(in(0), in(1)) & mask_of(i.n));
    else
      f.set(i.d[0], op(in(0)) & mask_of(i.n));
  };
}
inline void decode_shift(Dots& dots, Decoding& d) {
  const bool left = dots.name() == "shl";
  const std::string type = dots.next();
  dots.end();
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    d.plain(3);
    d.i.m = left;
    d.i.run = [](Frame& f, const Instruction& i) {
      constexpr uint32_t bits = sizeof(T) * 8;
      const uint32_t by =
          f.get<uint32_t>(i.a[1]);  // what is shifted farther than the width is gone
      const T x = f.get<T>(i.a[0]);
      if (i.m) return f.set(i.d[0], T(by >= bits ? 0 : uint64_t(x) << by));
      if (std::is_signed_v<T>) return f.set(i.d[0], T(x >> std::min(by, bits - 1)));
      f.set(i.d[0], T(by >= bits ? 0 : x >> by));
    };
  });
}
inline void decode_funnel(Dots& dots, Decoding& d) {  // shf: two registers shifted as one
  d.i.n = dots.one_of({"l", "r"});
  d.i.m = dots.one_of({"wrap", "clamp"});
  dots.want("b32");
  dots.end();
  d.plain(4);
  d.i.run = [](Frame& f, const Instruction& i) {
    const uint64_t both = uint64_t(f.get<uint32_t>(i.a[1])) << 32 | f.get<uint32_t>(i.a[0]);
    const uint32_t by = f.get<uint32_t>(i.a[2]), n = i.m ? std::min(by, 32u) : by & 31;
    f.set(i.d[0], uint32_t(i.n ? both >> n : both << n >> 32));
  };
}
inline void decode_select(Dots& dots, Decoding& d) {
  d.i.n = width_of(dots, dots.next());
  dots.end();
  d.plain(4);
  d.i.run = [](Frame& f, const Instruction& i) {
    f.set(i.d[0], f.r[i.a[f.get<bool>(i.a[2]) ? 0 : 1]] & mask_of(i.n));
  };
}

// ---- setp ----

constexpr int kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8;
inline int relation(Dots& dots, bool floats) {
  static const std::map<std::string, int> ordered = {
      {"lt", kLess},  {"le", kLess | kEqual},   {"gt", kGreater}, {"ge", kGreater | kEqual},
      {"eq", kEqual}, {"ne", kLess | kGreater}, {"num", 7}};
  const std::string name = dots.next();
  const auto found = ordered.find(name);
  if (found != ordered.end()) return found->second;
  if (name == "nan") return kUnordered;
  if (floats && name.size() == 3 && name[2] == 'u' && ordered.count(name.substr(0, 2)))
    return ordered.at(name.substr(0, 2)) | kUnordered;
  static const std::map<std::string, int> whole = {
      {"lo", kLess}, {"ls", kLess | kEqual}, {"hi", kGreater}, {"hs", kGreater | kEqual}};
  if (!floats && whole.count(name)) return whole.at(name);
  refuse(dots.statement, "comparison ." + name);
}
template <class T>
bool holds(T x, T y, int relation) {
  return relation & (x < y ? kLess : x > y ? kGreater : x == y ? kEqual : kUnordered);
}
template <class T>
void set_compare(Decoding& d) {
  d.i.run = [](Frame& f, const Instruction& i) {
    using namespace emulator;
    auto in = [&](int k) {
      if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>)
        return value(f.get<T>(i.a[k]));
      else if constexpr (std::is_same_v<T, float>)
        return i.ftz ? flushed(f.get<T>(i.a[k])) : f.get<T>(i.a[k]);
      else
        return f.get<T>(i.a[k]);
    };
    const bool c = i.m ? f.get<bool>(i.a[2]) : false, v = holds(in(0), in(1), i.n);
    auto with = [&](bool x) {
      return i.m == 1 ? x && c : i.m == 2 ? x || c : i.m == 3 ? x != c : x;
    };
    f.set<uint64_t>(i.d[0], with(v));
    if (i.d.size() > 1) f.set<uint64_t>(i.d[1], with(!v));
  };
}
template <class T>
void set_compare_pair(Decoding& d) {
  d.i.run = [](Frame& f, const Instruction& i) {
    const uint32_t x = f.get<uint32_t>(i.a[0]), y = f.get<uint32_t>(i.a[1]);
    for (int h = 0; h < 2; ++h)
      f.set<uint64_t>(i.d[h], holds(emulator::half_of<T>(x, h), emulator::half_of<T>(y, h), i.n));
  };
}
inline void decode_compare(Dots& dots, Decoding& d) {
  const std::string& opcode = d.s.opcode;
  const std::string type = opcode.substr(opcode.rfind('.') + 1);
  d.i.n = relation(dots, type.find('f') != std::string::npos);
  d.i.m = dots.take("and") ? 1 : dots.take("or") ? 2 : dots.take("xor") ? 3 : 0;
  d.i.ftz = dots.take("ftz");
  dots.want(type);
  dots.end();
  d.refuse_operands(d.i.m ? 4 : 3);
  d.write(d.s.operands[0]);
  if (d.s.operands[0].second >= 0) d.i.d.push_back(d.s.operands[0].second);
  for (size_t k = 1; k < d.s.operands.size(); ++k) d.read(d.s.operands[k]);
  if (d.i.ftz && type != "f32") refuse(dots.statement, "ftz of ." + type);
  if (type == "f32") return set_compare<float>(d);
  if (type == "f64") return set_compare<double>(d);
  if (type == "f16") return set_compare<f16>(d);
  if (type == "bf16") return set_compare<bf16>(d);
  if (type == "f16x2" || type == "bf16x2") {
    if (d.i.d.size() != 2 || d.i.m) refuse(dots.statement, "a pair gives p|q");
    return type == "f16x2" ? set_compare_pair<f16>(d) : set_compare_pair<bf16>(d);
  }
  integer_type(dots, type, [&](auto tag) { set_compare<decltype(tag)>(d); });
}

// ---- cvt ----

template <class To, class From>
To converted(
    From x,
    int rounding) {  // rounding of floats to integers: 0 none, 1 nearest, 2 zero, 3 down, 4 up
  using namespace emulator;
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    const double v = rounding == 1   ? std::nearbyint(x)
                     : rounding == 2 ? std::trunc(x)
                     : rounding == 3 ? std::floor(x)
                                     : std::ceil(x);
    if (v != v) return 0;
    const double low = double(std::numeric_limits<To>::min()),
                 high = double(std::numeric_limits<To>::max());
    return v <= low    ? std::numeric_limits<To>::min()
           : v >= high ? std::numeric_limits<To>::max()
                       : To(v);
  } else if constexpr (std::is_floating_point_v<From> && std::is_floating_point_v<To>) {
    const From v = rounding == 1   ? std::nearbyint(x)
                   : rounding == 2 ? std::trunc(x)
                   : rounding == 3 ? std::floor(x)
                   : rounding == 4 ? std::ceil(x)
                                   : x;
    return To(v);
  } else if constexpr (std::is_same_v<To, f16> || std::is_same_v<To, bf16>) {
    return rounded<To>(float(x));
  } else if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16>) {
    return To(value(x));
  } else {
    return To(x);
  }
}
template <class Act>
void any_type(Dots& dots, const std::string& type, Act act) {
  if (type == "f32") return act(float{});
  if (type == "f64") return act(double{});
  if (type == "f16") return act(f16{});
  if (type == "bf16") return act(bf16{});
  if (type == "u8" || type == "b8") return act(uint8_t{});
  if (type == "s8") return act(int8_t{});
  integer_type(dots, type, act);
}
template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

inline void decode_convert(Dots& dots, Decoding& d) {
  const bool nearest = dots.take("rn");
  const int rounding = nearest            ? 0
                       : dots.take("rni") ? 1
                       : dots.take("rzi") ? 2
                       : dots.take("rmi") ? 3
                       : dots.take("rpi") ? 4
                                          : 0;
  d.i.ftz = dots.take("ftz");
  const std::string to = dots.next(), from = dots.next();
  dots.end();
  if (to == "f16x2" || to == "bf16x2") {  // the first operand becomes the high half
    if (!nearest || from != "f32" || d.i.ftz) refuse(dots.statement, "conversion");
    d.plain(3);
    d.i.m = to == "bf16x2";
    d.i.run = [](Frame& f, const Instruction& i) {
      auto half = [&](int k) {
        const float x = f.get<float>(i.a[k]);
        return uint32_t(i.m ? emulator::rounded<bf16>(x).bits : emulator::rounded<f16>(x).bits);
      };
      f.set(i.d[0], half(0) << 16 | half(1));
    };
    return;
  }
  d.plain(2);
  d.i.n = rounding;
  any_type(dots, to, [&](auto to_tag) {
    any_type(dots, from, [&](auto from_tag) {
      using To = decltype(to_tag);
      using From = decltype(from_tag);
      constexpr bool halves = is_half<To> || is_half<From>,
                     whole = std::is_integral_v<To> && std::is_integral_v<From>;
      constexpr bool to_whole = std::is_floating_point_v<From> && std::is_integral_v<To>;
      constexpr bool narrows =
          !whole && !to_whole && sizeof(To) <= sizeof(From) && !std::is_same_v<To, From>;
      if ((is_half<To> && !std::is_same_v<From, float>) ||
          (is_half<From> && !std::is_same_v<To, float>))
        refuse(dots.statement, "conversion");
      if (to_whole != (rounding != 0) && !(std::is_same_v<To, From> && rounding))
        refuse(dots.statement, "rounding");
      if (nearest && (whole || to_whole || is_half<From>)) refuse(dots.statement, "rounding");
      if (narrows && !nearest) refuse(dots.statement, "rounding");
      if (d.i.ftz && !(std::is_same_v<From, float> && !halves)) refuse(dots.statement, "ftz");
      if constexpr (!halves || std::is_same_v<To, float> || std::is_same_v<From, float>) {
        d.i.run = [](Frame& f, const Instruction& i) {
          From x = f.get<From>(i.a[0]);
          if constexpr (std::is_same_v<From, float>)
            if (i.ftz) x = flushed(x);
          const To y = converted<To>(x, i.n);
          // A destination register may be wider than the type: integers extend into it.
          if constexpr (std::is_integral_v<To> && sizeof(To) < 4)
            f.set(i.d[0], std::is_signed_v<To> ? uint32_t(int32_t(y)) : uint32_t(y));
          else
            f.set(i.d[0], y);
        };
      }
    });
  });
}

// ---- fields of bits ----

template <class Op>
void on_words(Dots& dots, Decoding& d, Op, size_t inputs) {  // .b32 only
  dots.want("b32");
  dots.end();
  d.plain(inputs + 1);
  d.i.run = [](Frame& f, const Instruction& i) {
    uint32_t in[4] = {};
    for (size_t k = 0; k < i.a.size(); ++k) in[k] = f.get<uint32_t>(i.a[k]);
    f.set(i.d[0], uint32_t(Op{}(in)));
  };
}
inline void decode_extract(Dots& dots, Decoding& d) {  // bfe
  const std::string type = dots.next();
  dots.end();
  integer_type(dots, type, [&](auto tag) {
    using T = decltype(tag);
    d.plain(4);
    d.i.run = [](Frame& f, const Instruction& i) {
      constexpr int bits = sizeof(T) * 8;
      const int first = int(f.r[i.a[1]] & 255), count = int(f.r[i.a[2]] & 255);
      const uint64_t x = uint64_t(f.get<std::make_unsigned_t<T>>(i.a[0]));
      uint64_t field = first >= bits ? 0 : x >> first;
      const uint64_t kept = count >= 64 ? ~0ull : (1ull << count) - 1;
      field &= kept;
      const int sign_at = std::min(first + count - 1, bits - 1);
      if (std::is_signed_v<T> && count && (x >> sign_at & 1))
        field |= ~(first >= bits ? 0 : kept & mask_of(bits) >> first);
      f.set(i.d[0], T(field));
    };
  });
}

inline const Decoders& logic_decoders() {
  static const Decoders all = {
      {"mov", decode_move},
      {"and", [](Dots& n,
                 Decoding& d) { bitwise(n, d, [](uint64_t a, uint64_t b) { return a & b; }, 2); }},
      {"or", [](Dots& n,
                Decoding& d) { bitwise(n, d, [](uint64_t a, uint64_t b) { return a | b; }, 2); }},
      {"xor", [](Dots& n,
                 Decoding& d) { bitwise(n, d, [](uint64_t a, uint64_t b) { return a ^ b; }, 2); }},
      {"not", [](Dots& n, Decoding& d) { bitwise(n, d, [](uint64_t a) { return ~a; }, 1); }},
      {"shl", decode_shift},
      {"shr", decode_shift},
      {"shf", decode_funnel},
      {"selp", decode_select},
      {"setp", decode_compare},
      {"cvt", decode_convert},
      {"bfe", decode_extract},
      {"popc",
       [](Dots& n, Decoding& d) {
         on_words(n, d, [](const uint32_t* x) { return __builtin_popcount(x[0]); }, 1);
       }},
      {"clz",
       [](Dots& n, Decoding& d) {
         on_words(n, d, [](const uint32_t* x) { return x[0] ? __builtin_clz(x[0]) : 32; }, 1);
       }},
      {"prmt",
       [](Dots& n, Decoding& d) {
         on_words(
             n, d,
             [](const uint32_t* x) {
               const uint64_t both = x[0] | uint64_t(x[1]) << 32;
               uint32_t v = 0;
               for (int k = 0; k < 4; ++k) {
                 const int pick = int(x[2] >> (4 * k)) & 15;  // bit 3: the byte's sign, eight times
                 const uint32_t byte = uint32_t(both >> (8 * (pick & 7))) & 255;
                 v |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
               }
               return v;
             },
             3);
       }},
      {"lop3",
       [](Dots& n, Decoding& d) {
         on_words(
             n, d,
             [](const uint32_t* x) {
               uint32_t v = 0;
               for (int k = 0; k < 8; ++k)
                 if (x[3] >> k & 1)
                   v |= (k & 4 ? x[0] : ~x[0]) & (k & 2 ? x[1] : ~x[1]) & (k & 1 ? x[2] : ~x[2]);
               return v;
             },
             4);
       }},
  };
  return all;
}

}  // namespace ptx
