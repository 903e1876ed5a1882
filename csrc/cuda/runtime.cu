#include "runtime.h"

#include <cuda_runtime.h>

#include <atomic>

namespace fused_kd {

int describe_device(int index, Device* device) {
  constexpr int MAX_DEVICES = 64;
  static std::atomic<int> capabilities[MAX_DEVICES], shared_bytes[MAX_DEVICES];  // 0: not asked yet
  if (index < 0 || index >= MAX_DEVICES) return cudaErrorInvalidDevice;
  if (capabilities[index] == 0) {
    int major = 0, minor = 0, bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (!error)
      error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error) {
      cudaGetLastError();  // an error that is returned is not left for the next one who asks
      return error;
    }
    shared_bytes[index] = bytes;
    capabilities[index] = 10 * major + minor;
  }
  *device = {capabilities[index], shared_bytes[index]};
  return 0;
}

int toolkit() { return CUDART_VERSION; }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fused_kd
