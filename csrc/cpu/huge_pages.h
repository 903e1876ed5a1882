// Huge pages for memory that a kernel is about to fill. Torch-free.
#pragma once

#include <stdint.h>

namespace fused_kd {

// Requests huge pages for the addresses [begin, end) if they are many, the system leaves the choice
// to the application, and new huge pages are cheap. Memory that was written before stays as it is.
void request_huge_pages(uintptr_t begin, uintptr_t end);

}  // namespace fused_kd
