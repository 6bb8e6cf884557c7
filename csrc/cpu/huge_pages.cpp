#include "cpu/huge_pages.h"

#include "arithmetic.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vpns {

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  const int64_t first = reinterpret_cast<intptr_t>(memory);
  const int64_t begin = round_up(first, kPage), end = (first + bytes) / kPage * kPage;
  // Advice only: where it is refused nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vpns
