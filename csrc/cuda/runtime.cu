#include "runtime.h"

#include <cuda_runtime.h>

#include <mutex>

#include "instances.h"

namespace fused_kd {

namespace {

int attribute(cudaDeviceAttr which, int index, int* value) {
  return taken(cudaDeviceGetAttribute(value, which, index));
}

// Queries the current device, whose index must be passed.
int query(int index, Device* device) {
  int error = kernels_are_there(), shared = 0;
  if (!error) error = attribute(cudaDevAttrMultiProcessorCount, index, &device->multiprocessors);
  if (!error) error = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index, &shared);
  if (error) return error;
  // the system reserves 1 KiB per block, and allocates memory in units of 128 bytes
  const auto bytes_of = [&](int blocks) { return (shared / blocks - 1024) / 128 * 128; };
  device->bytes_of_three = bytes_of(3);
  device->bytes_of_two = bytes_of(2);
  device->cluster = 16;
  while (device->cluster && !can_run_clusters(device->cluster, device->bytes_of_two))
    device->cluster /= 2;
  return 0;
}

}  // namespace

int describe_device(int index, Device* device) {
  constexpr int MAX_DEVICES = 64;
  static std::mutex mutex;
  static Device known[MAX_DEVICES];  // without multiprocessors: not queried yet
  if (index < 0 || index >= MAX_DEVICES) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[index].multiprocessors == 0) {
    Device queried = {};
    const int error = query(index, &queried);
    if (error) return error;
    known[index] = queried;
  }
  *device = known[index];
  return 0;
}

int toolkit() { return CUDART_VERSION; }

const char* error_text(int error) {
  if (error == TOO_FEW_MULTIPROCESSORS) return "the device has too few multiprocessors for this V";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_kd
