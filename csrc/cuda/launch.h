// The interface of the CUDA kernels for a binding. Torch-free.
//
// All pointers of a problem, including `scale`, are to device memory. No function waits for the
// device; those that launch return 0 or a CUDA error.
#pragma once

#include "../problem.h"

namespace fused_kd {

constexpr int64_t MAX_V = int64_t(1) << 30, MAX_N = (int64_t(1) << 31) - 1;

struct Device {
  int multiprocessors;
  int bytes_of_three;  // shared memory of a block if three fit on a multiprocessor
  int bytes_of_two;    // ... if two fit
  int cluster;  // blocks of the largest cluster that the kernels and the device allow; 0: none
};

// Returns the bytes of device memory that launch_rows needs as its workspace.
int64_t workspace_bytes(const Problem&, const Device&);
// The error if the blocks of a row, which wait for each other, do not all fit on the device.
constexpr int TOO_FEW_MULTIPROCESSORS = -1;
// Computes losses and statistics; also the gradient if the problem has one.
int launch_rows(const Problem&, const Device&, void* workspace, void* stream);
// Computes the gradient from the statistics of an earlier launch.
int launch_gradient(const Problem&, const Device&, void* stream);
// Replaces a gradient for these weights by `scale` times it, rounded once: by multiplication if
// that is exact or as accurate, else from the logits. The decision is made on the device.
int launch_rescale(const Problem&, const Device&, void* stream);
// The same by multiplication alone, without the logits.
int launch_scale(const Rows& grad, int64_t N, int64_t V, const float* scale, const Device&,
                 void* stream);
// Computes the columns of fused_kd.measures.Sums (N, MEASURES), and the first largest entry of each
// side (N, 2), after a launch of forward_kl whose hard, soft and stats the problem has. With
// classes: those of Support (N, SUPPORT_MEASURES), and the student's largest entry (N), without
// another launch; the teacher is not read. Rows whose soft term is off are not written.
int launch_measure(const Problem&, float* columns, int64_t* largest, void* stream);

}  // namespace fused_kd
