// Huge pages for memory that a kernel is about to fill.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operators.h"

namespace fused_kd {

// Requests huge pages for a large tensor if the system leaves that to the application. The page
// faults of new memory cost more than the kernel that fills it, and pages of 4 KiB slow the matrix
// products, whose tiles have a page for every row. Memory that was written before stays as it is.
inline void request_huge_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge = 2 << 20;
  const Extent memory = extent_of(x);
  const uintptr_t begin = (memory.begin + page - 1) & -page, end = memory.end & -page;
  if (end > begin + 2 * huge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fused_kd
