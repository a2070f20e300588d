// Instruction sets: which this processor has, which one the kernels use now, and how a call reaches
// the copy of a kernel that was compiled for it.
#pragma once

#include <string>
#include <vector>

namespace mmkern {

// In rising order; each includes the ones before it.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The name used in Python, in build flags and as the C++ namespace: "avx2", ...
const char* isa_name(Isa isa);

// Those compiled in that this processor and operating system can run, in rising order.
std::vector<Isa> available_isas();

// The one in use: the best available unless set_isa chose another (tests do).
extern Isa current_isa;
void set_isa(Isa isa);

}  // namespace mmkern

// Declares void name(const Args&) in every instruction set's namespace, and mmkern::name, which
// calls the one in use. The definitions stand in <op>.isa.cpp, inside namespace mmkern::MMKERN_ISA.
#if defined(__x86_64__)
#define MMKERN_KERNEL(name, Args)                            \
  namespace baseline {                                       \
  void name(const Args& args);                               \
  }                                                          \
  namespace avx2 {                                           \
  void name(const Args& args);                               \
  }                                                          \
  namespace avx512 {                                         \
  void name(const Args& args);                               \
  }                                                          \
  namespace avx512_bf16 {                                    \
  void name(const Args& args);                               \
  }                                                          \
  inline void name(const Args& args) {                       \
    switch (current_isa) {                                   \
      case Isa::avx512_bf16: return avx512_bf16::name(args); \
      case Isa::avx512: return avx512::name(args);           \
      case Isa::avx2: return avx2::name(args);               \
      case Isa::baseline: return baseline::name(args);       \
    }                                                        \
  }
#else
#define MMKERN_KERNEL(name, Args) \
  namespace baseline {            \
  void name(const Args& args);    \
  }                               \
  inline void name(const Args& args) { baseline::name(args); }
#endif
