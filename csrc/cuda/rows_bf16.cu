// The row kernels for a student in this type. Queries to the device use one of them for all types.
#define FUSED_KD_STUDENT bf16
#include "instances.h"

#ifndef FUSED_KD_CUDA_ON_CPU

namespace fused_kd {

bool can_run_clusters(int blocks, int shared_bytes) {
  const LaunchShape shape = {blocks, THREADS, shared_bytes, blocks, 1};
  return can_run_cluster(rows_cluster<Divergence::none, Dtype::bf16, true>, shape);
}

int kernels_are_there() {
  cudaFuncAttributes attributes;
  return taken(cudaFuncGetAttributes(&attributes, scale_rows<Dtype::bf16>));
}

}  // namespace fused_kd

#endif
