// How the CPU kernels divide work over threads, which the caller provides. Torch-free.
#pragma once

#include <stdint.h>

namespace fused_kd {

// Splits [0, n) over threads and calls body(context, begin, end) for each part.
struct Parallel {
  void (*split)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

}  // namespace fused_kd
