// The vector vocabulary of csrc/cpu/simd/vec.isa.h for one instruction set, callable from
// tests/test_vec.py.
#include "cpu/simd/vec.isa.h"

using namespace mmkern::MMKERN_ISA;

extern "C" int lanes() { return kLanes; }

// out[i] = op(x[i], y[i], z[i]), in full vectors and then a tail. Results of Mask type give 1 or 0.
extern "C" int apply(const char* op, const float* x, const float* y, const float* z, float* out,
                     long count) {
  const auto is = [op](const char* name) { return strcmp(op, name) == 0; };
  for (long i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? int(count - i) : kLanes;
    const Vec a = load_n(x + i, n), b = load_n(y + i, n), c = load_n(z + i, n), one = set1(1.0f);
    Vec r;
    if (is("add"))
      r = a + b;
    else if (is("sub"))
      r = a - b;
    else if (is("mul"))
      r = a * b;
    else if (is("div"))
      r = a / b;
    else if (is("fma"))
      r = fma(a, b, c);
    else if (is("fnma"))
      r = fnma(a, b, c);
    else if (is("max"))
      r = max(a, b);
    else if (is("min"))
      r = min(a, b);
    else if (is("abs"))
      r = abs(a);
    else if (is("sqrt"))
      r = sqrt(a);
    else if (is("round"))
      r = round(a);
    else if (is("pow2"))
      r = pow2(a);
    else if (is("exp2"))
      r = exp2(a);
    else if (is("less"))
      r = select(less(a, b), one, zero());
    else if (is("less_equal"))
      r = select(less_equal(a, b), one, zero());
    else if (is("equal"))
      r = select(equal(a, b), one, zero());
    else if (is("is_nan"))
      r = select(is_nan(a), one, zero());
    else if (is("logic"))
      r = select((less(a, b) & ~is_nan(c)) | equal(a, c), one, zero());
    else
      return 1;
    store_n(out + i, r, n);
  }
  return 0;
}

namespace {

// Full vectors through load and store, the tail through load_n and store_n.
template <class From, class To>
void convert_as(const void* from, void* to, long count) {
  const From* x = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  store_n(out + i, load_n(x + i, int(count - i)), int(count - i));
}

}  // namespace

extern "C" void f16_to_f32(const void* x, void* out, long n) {
  convert_as<mmkern::f16, float>(x, out, n);
}
extern "C" void bf16_to_f32(const void* x, void* out, long n) {
  convert_as<mmkern::bf16, float>(x, out, n);
}
extern "C" void f32_to_f16(const void* x, void* out, long n) {
  convert_as<float, mmkern::f16>(x, out, n);
}
extern "C" void f32_to_bf16(const void* x, void* out, long n) {
  convert_as<float, mmkern::bf16>(x, out, n);
}

// The reductions of the first n of x, 0 or -inf beyond; any() and load_mask over bytes; iota.
extern "C" void reduce(const float* x, const uint8_t* bytes, int n, float* out) {
  const Mask valid = first_n(n);
  out[0] = reduce_add(load_n(x, n));
  out[1] = reduce_max(select(valid, load_n(x, n), set1(-kInf)));
  out[2] = any(load_mask_n(bytes, n)) ? 1.0f : 0.0f;
  out[3] = reduce_add(select(load_mask(bytes), iota(), zero()));
}
