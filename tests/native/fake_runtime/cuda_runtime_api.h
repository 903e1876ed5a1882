// A CUDA runtime that records its calls, for check_launching.cpp: as much of it as
// csrc/cuda/launching.h uses.
#pragma once

#include <stddef.h>

#include <map>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

// What the fake runtime is and has seen.
struct FakeRuntime {
  int device = 0;
  cudaError_t next_error = cudaSuccess, last_error = cudaSuccess;
  std::map<std::pair<const void*, int>, int> limits;  // of shared memory, by kernel and device
  std::vector<std::pair<cudaFuncAttribute, int>> set;
  int launches = 0;

  cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
  }
};
inline FakeRuntime runtime;

inline cudaError_t cudaGetLastError() { return std::exchange(runtime.last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) { return *device = runtime.device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = (device == 0 ? 227 : 99) * 1024, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  if (const cudaError_t error = std::exchange(runtime.next_error, cudaSuccess))
    return runtime.answer(error);
  runtime.set.push_back({attribute, value});
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    runtime.limits[{kernel, runtime.device}] = value;
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void**) {
  const auto limit = runtime.limits.find({kernel, runtime.device});
  const size_t most = limit == runtime.limits.end() ? 48 * 1024 : size_t(limit->second);
  if (config->dynamicSmemBytes > most) return runtime.answer(cudaErrorInvalidValue);
  ++runtime.launches;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t*) {
  return *clusters = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
