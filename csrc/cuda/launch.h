// The functions by which a binding runs a problem on a GPU. Torch-free.
//
// All pointers of a problem, `scale` too, are to device memory. Nothing waits for the device; every
// function returns 0 or a CUDA error.
#pragma once

#include "../problem.h"

namespace fused_kd {

constexpr int64_t MAX_V = int64_t(1) << 30, MAX_N = (int64_t(1) << 31) - 1;

struct Device {
  int multiprocessors;
  int bytes_of_three;  // shared memory of a block of which three fit on a multiprocessor
  int bytes_of_two;    // ... two
  int cluster;  // blocks of the largest cluster that the kernels and the device allow; 0: none
};

// Device memory that launch_rows needs besides the problem's, in bytes.
int64_t workspace_bytes(const Problem&, const Device&);
// Returned if the blocks of a row, which wait for each other, may not all be resident at once.
constexpr int TOO_FEW_MULTIPROCESSORS = -1;
// Losses and statistics; also the gradient if the problem has one.
int launch_rows(const Problem&, const Device&, void* workspace, void* stream);
// The gradient from the statistics of an earlier launch.
int launch_gradient(const Problem&, const Device&, void* stream);
// Replaces a gradient that was computed with these weights by `scale` times it, rounded once: by
// multiplication if that is exact or as accurate, else from the logits. The device decides.
int launch_rescale(const Problem&, const Device&, void* stream);
// The same by multiplication alone: for a gradient whose logits are freed.
int launch_scale(const Rows& grad, int64_t N, int64_t V, const float* scale, const Device&,
                 void* stream);

}  // namespace fused_kd
