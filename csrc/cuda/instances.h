// The instances of the kernels; each student type has its own translation unit.
#pragma once

#include "measure.cuh"

namespace fused_kd {

enum class Kernel { general, cluster, scale, measure };

// Launch the instance for this divergence and these types.
int launch_f32(Kernel, Divergence, const LaunchShape&, void* stream, const Params&);
int launch_bf16(Kernel, Divergence, const LaunchShape&, void* stream, const Params&);
int launch_f16(Kernel, Divergence, const LaunchShape&, void* stream, const Params&);

// Returns whether the device can run clusters of this number of blocks, of which each has
// `shared_bytes` of shared memory.
bool can_run_clusters(int blocks, int shared_bytes);
// Returns 0, or a CUDA error if there are no kernels for the device.
int kernels_are_there();

#ifdef FUSED_KD_STUDENT

template <Divergence D, Dtype S, bool SAME>
int launch_typed(Kernel kernel, const LaunchShape& shape, void* stream, const Params& params) {
  return kernel == Kernel::general ? launch_kernel(rows_general<D, S, SAME>, shape, stream, params)
                                   : launch_kernel(rows_cluster<D, S, SAME>, shape, stream, params);
}

template <Dtype S, bool SAME>
int launch_divergence(Kernel kernel, Divergence divergence, const LaunchShape& shape, void* stream,
                      const Params& params) {
  return with_rule(divergence, [&](auto rule) {
    if constexpr (rule.SOFTMAX && !rule.READS_TEACHER)
      return 1;  // cudaErrorInvalidValue: the tail alone is no row
    else
      return launch_typed<rule.DIVERGENCE, S, SAME>(kernel, shape, stream, params);
  });
}

template <Dtype S>
int launch_measuring(const LaunchShape& shape, void* stream, const Params& params) {
  return launch_kernel(params.has_classes          ? measure_support<S>
                       : params.teacher.dtype == S ? measure_rows<S, true>
                                                   : measure_rows<S, false>,
                       shape, stream, params);
}

#define FUSED_KD_JOIN_(a, b) a##b
#define FUSED_KD_JOIN(a, b) FUSED_KD_JOIN_(a, b)

int FUSED_KD_JOIN(launch_, FUSED_KD_STUDENT)(Kernel kernel, Divergence divergence,
                                             const LaunchShape& shape, void* stream,
                                             const Params& params) {
  constexpr Dtype S = Dtype::FUSED_KD_STUDENT;
  if (kernel == Kernel::scale) return launch_kernel(scale_rows<S>, shape, stream, params);
  if (kernel == Kernel::measure) return launch_measuring<S>(shape, stream, params);
  if (params.has_classes)
    return kernel == Kernel::general
               ? launch_kernel(rows_general_classes<S>, shape, stream, params)
               : launch_kernel(rows_cluster_classes<S>, shape, stream, params);
  return params.teacher.dtype == S
             ? launch_divergence<S, true>(kernel, divergence, shape, stream, params)
             : launch_divergence<S, false>(kernel, divergence, shape, stream, params);
}

#endif

}  // namespace fused_kd
