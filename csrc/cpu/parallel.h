// How the CPU kernels divide work among threads, which the caller provides. Torch-free.
#pragma once

#include <stdint.h>

namespace fused_kd {

// Divides [0, n) among threads and calls body(context, begin, end) for each part.
struct Parallel {
  void (*split)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

}  // namespace fused_kd
