// Keeps the library within glibc 2.28, torch's own limit, when it is compiled where glibc is newer:
// linked in, these hidden names stand before the libraries' newer versions of the same functions.
// `make wheel` has auditwheel look whether that is all it takes.
#if defined(__linux__) && __has_include(<features.h>)
#include <features.h>
#endif

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#if defined(__x86_64__)
#define MMKERN_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define MMKERN_FIRST_GLIBC "GLIBC_2.17"
#endif
#define MMKERN_HIDDEN(name) __asm__(name) __attribute__((visibility("hidden")))

// glibc 2.29 made these faster by leaving out errno; the values are the same.
#define MMKERN_FIRST_VERSION(name)                                   \
  extern "C" double first_##name(double);                            \
  __asm__(".symver first_" #name ", " #name "@" MMKERN_FIRST_GLIBC); \
  double our_##name(double x) MMKERN_HIDDEN(#name);                  \
  double our_##name(double x) { return first_##name(x); }

MMKERN_FIRST_VERSION(exp)
MMKERN_FIRST_VERSION(exp2)
MMKERN_FIRST_VERSION(log)
MMKERN_FIRST_VERSION(log2)

// libstdc++ asks glibc 2.32 whether shared_ptr may count without atomics: here it may not.
extern char our_single_threaded MMKERN_HIDDEN("__libc_single_threaded");
char our_single_threaded = 0;

#endif
