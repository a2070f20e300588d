// Instruction sets: which this processor has, which one the kernels use now, and how a call reaches
// the copy of a kernel that was compiled for it. No standard library here: see parallel.h.
#pragma once

// Several sets are for x86-64. A build under a sanitizer takes one: compiling takes minutes.
#if defined(__x86_64__) && !defined(MMKERN_ONE_ISA)
#define MMKERN_SETS 1
#else
#define MMKERN_SETS 0
#endif

namespace mmkern {

// In rising order; each includes the ones before it.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// Those compiled in.
#if MMKERN_SETS
constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
#else
constexpr Isa kIsas[] = {Isa::baseline};
#endif

// The name used in Python, in build flags and as the C++ namespace: "avx2", ...
const char* isa_name(Isa isa);

// Whether this processor and operating system can run it.
bool has_isa(Isa isa);

// The one in use, process-wide: the best there is, until set to another (tests do) that has_isa.
extern Isa current_isa;

}  // namespace mmkern

// Declares void name(const Args&) in every instruction set's namespace, and mmkern::name, which
// calls the one in use. The definitions stand in <op>.isa.cpp, inside namespace mmkern::MMKERN_ISA.
#if MMKERN_SETS
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
