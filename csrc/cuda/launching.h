// Launches kernels. Host code only, so that tests can run it on a fake runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <mutex>
#include <set>
#include <utility>

namespace fused_kd {

struct LaunchShape {
  int64_t grid;
  int block;
  int shared_bytes;
  int cluster;
  int waits_for;  // number of blocks that wait for each other (wait_until); 1: no block waits
};

// Returns the error, and clears the runtime's copy so that no later call reports it again.
inline int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// A shape as the runtime's structs.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(const LaunchShape& shape, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(shape.grid));
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;  // config points into it
};

// Allows a kernel, on the current device, everything that any launch of it may use: all of the
// shared memory that a block can have, in place of the L1 cache, and clusters of 16 blocks. Set
// once per device, since these are attributes of the kernel: another thread could lower a limit
// that is set for one launch before it happens.
inline int allow_everything(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, bytes = 0;
  if (const int error = taken(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return 0;
  const cudaDeviceAttr most = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (const int error = taken(cudaDeviceGetAttribute(&bytes, most, device))) return error;
  const std::pair<cudaFuncAttribute, int> limits[] = {
      {cudaFuncAttributeMaxDynamicSharedMemorySize, bytes},
      {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared},
      {cudaFuncAttributeNonPortableClusterSizeAllowed, 1}};
  for (const auto& [attribute, value] : limits)
    if (const int error = taken(cudaFuncSetAttribute(kernel, attribute, value))) return error;
  allowed.insert({kernel, device});
  return 0;
}

// Launches a kernel; returns 0 or the CUDA error.
template <class Params>
int launch_kernel(void (*kernel)(Params), const LaunchShape& shape, void* stream,
                  const Params& params) {
  const void* address = reinterpret_cast<const void*>(kernel);
  // not otherwise: a plain launch also works on devices without clusters
  if (shape.shared_bytes > 48 * 1024 || shape.cluster > 1)
    if (const int error = allow_everything(address)) return error;
  const Launch launch(shape, stream);
  void* arguments[] = {const_cast<Params*>(&params)};
  return taken(cudaLaunchKernelExC(&launch.config, address, arguments));
}

// Returns whether the device can run clusters of this shape, with shape.shared_bytes per block.
template <class Params>
bool can_run_cluster(void (*kernel)(Params), const LaunchShape& shape) {
  const void* address = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  if (taken(cudaFuncGetAttributes(&attributes, address))) return false;
  if (attributes.ptxVersion < 90) return false;  // compiled for devices without clusters
  if (allow_everything(address)) return false;
  const Launch launch(shape, nullptr);
  int clusters = 0;
  return taken(cudaOccupancyMaxActiveClusters(&clusters, address, &launch.config)) == 0 &&
         clusters > 0;
}

inline int clear_memory(void* p, int64_t bytes, void* stream) {
  return taken(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fused_kd
