#include "cpu/isa.h"

#include <stdexcept>

namespace mmkern {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: return "baseline";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return isas;
  isas.push_back(Isa::avx2);
  for (const bool has :
       {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
        __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0}) {
    if (!has) return isas;
  }
  isas.push_back(Isa::avx512);
  if (__builtin_cpu_supports("avx512bf16")) isas.push_back(Isa::avx512_bf16);
#endif
  return isas;
}

Isa current_isa = available_isas().back();

void set_isa(Isa isa) {
  for (const Isa each : available_isas()) {
    if (each == isa) {
      current_isa = isa;
      return;
    }
  }
  throw std::invalid_argument(std::string("isa: this processor cannot run ") + isa_name(isa));
}

}  // namespace mmkern
