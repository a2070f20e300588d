#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mmkern {
namespace {

#if defined(__x86_64__)
// Compilers differ on whether __builtin_cpu_supports knows "f16c": leaf 1, ecx, bit 29.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(__aarch64__)
bool has_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16, which older headers do not name
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) && value;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
  Isa best = Isa::baseline;
  for (const Isa isa : kIsas) {
    if (has_isa(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::neon_bf16: return "neon_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: return "baseline";
  }
  return "unknown";
}

// Exactly the flags that setup.py compiles each with. __builtin_cpu_supports also asks whether the
// operating system saves the wide registers.
bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::baseline: return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::avx512:
      return has_isa(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16: return has_isa(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case Isa::neon_bf16: return has_bf16();
#endif
    default: return false;
  }
}

Isa current_isa = best_isa();

}  // namespace mmkern
