#include "cpu/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmkern {

void use_large_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t from = (uintptr_t(p) + kPage - 1) & ~(kPage - 1);
  const uintptr_t to = (uintptr_t(p) + bytes) & ~(kPage - 1);
  // What the system answers does not matter: small pages do as well, slower.
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace mmkern
