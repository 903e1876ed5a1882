// What csrc/cuda/launch.cu would launch for a problem, kept instead of launched: the same plan, the
// same parameters, no kernel and no device. For benchmarks/cuda_executed.py.
#include "launch.cu"

namespace fused_kd {

namespace {

struct {
  int launches, cluster_kernel;
  LaunchShape shape;
  Params params;
} kept;

int keep(Kernel kernel, const LaunchShape& shape, const Params& params) {
  ++kept.launches;
  kept.cluster_kernel = kernel == Kernel::cluster;
  kept.shape = shape;
  kept.params = params;
  return 0;
}

}  // namespace

int launch_f32(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -2; }
int launch_f16(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -2; }
int launch_bf16(Kernel kernel, Divergence, const LaunchShape& shape, void*, const Params& params) {
  return keep(kernel, shape, params);
}

}  // namespace fused_kd

// Rows of bfloat16, one after another; a null pointer to weights turns that term off. Returns 0 if
// there is one launch of the cluster kernel.
extern "C" __attribute__((visibility("default"))) int capture(
    int64_t N, int64_t V, int divergence, double temperature, double soft_factor, void* student,
    void* teacher, void* grad, const int64_t* labels, const float* w_hard, const float* w_soft,
    float* hard, float* soft, float* stats, int multiprocessors, int bytes_of_three,
    int bytes_of_two) {
  using namespace fused_kd;
  Problem p = {};
  p.N = N;
  p.V = V;
  p.student = {student, Dtype::bf16, N, 0, V};
  p.teacher = {teacher, Dtype::bf16, N, 0, V};
  p.grad = {grad, Dtype::bf16, N, 0, V};
  p.labels = labels;
  p.w_hard = w_hard;
  p.w_soft = w_soft;
  p.divergence = static_cast<Divergence>(divergence);
  p.temperature = temperature;
  p.beta = 0.5;
  p.soft_factor = soft_factor;
  p.hard = hard;
  p.soft = soft;
  p.stats = stats;
  Device device = {};
  device.multiprocessors = multiprocessors;
  device.bytes_of_three = bytes_of_three;
  device.bytes_of_two = bytes_of_two;
  device.cluster = 16;
  kept.launches = 0;
  const int error = launch_rows(p, device, nullptr, nullptr);
  return error ? error : kept.launches != 1 || !kept.cluster_kernel;
}

extern "C" __attribute__((visibility("default"))) int captured_bytes() {
  return sizeof(fused_kd::Params);
}

// The parameters, then grid, threads and shared bytes of a block, blocks of a cluster.
extern "C" __attribute__((visibility("default"))) void captured(void* params, int64_t* shape) {
  using namespace fused_kd;
  memcpy(params, &kept.params, sizeof(Params));
  shape[0] = kept.shape.grid;
  shape[1] = kept.shape.block;
  shape[2] = kept.shape.shared_bytes;
  shape[3] = kept.shape.cluster;
}
