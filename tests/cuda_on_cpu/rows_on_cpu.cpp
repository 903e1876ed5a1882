// The CUDA backend's launchers for ctypes: the files of csrc/cuda/ run on the CPU.
#include <cuda_on_cpu.h>

#include "../../csrc/cuda/launch.h"

using fused_kd::Device;
using fused_kd::Problem;

enum What : int { ROWS = 0, GRADIENT = 1, RESCALE = 2, SCALE = 3 };

// The workspace is as large as it says, and filled with garbage.
static int rows(const Problem& p, const Device& device) {
  const int64_t bytes = fused_kd::workspace_bytes(p, device);
  if (bytes == 0) return fused_kd::launch_rows(p, device, nullptr, nullptr);
  unsigned char* workspace = new unsigned char[bytes];
  memset(workspace, 0xff, bytes);
  const int error = fused_kd::launch_rows(p, device, workspace, nullptr);
  delete[] workspace;
  return error;
}

extern "C" __attribute__((visibility("default"))) int run(int what, const Problem* p,
                                                          const Device* device) {
  switch (what) {
    case ROWS: return rows(*p, *device);
    case GRADIENT: return fused_kd::launch_gradient(*p, *device, nullptr);
    case RESCALE: return fused_kd::launch_rescale(*p, *device, nullptr);
    default: return fused_kd::launch_scale(p->grad, p->N, p->V, p->scale, *device, nullptr);
  }
}

extern "C" __attribute__((visibility("default"))) int measure(const Problem* p, float* columns,
                                                              int64_t* largest) {
  return fused_kd::launch_measure(*p, columns, largest, nullptr);
}

extern "C" __attribute__((visibility("default"))) int64_t workspace(const Problem* p,
                                                                    const Device* device) {
  return fused_kd::workspace_bytes(*p, *device);
}
