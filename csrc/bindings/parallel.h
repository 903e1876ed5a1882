// torch's thread pool as the `Parallel` of the torch-free kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/parallel.h"

namespace fused_kd {

inline Parallel torch_threads() {
  auto split = [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {split, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace fused_kd
