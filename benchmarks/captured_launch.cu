// What csrc/cuda/launch.cu would launch on an H200, kept instead of launched: the same plan and the
// same parameters, without a kernel or a device. For benchmarks/cuda_executed.py.
#include "launch.cu"

namespace fused_kd {

static int cluster_launches, other_launches;
static LaunchShape kept_shape;
static Params kept_params;

int launch_f32(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -2; }
int launch_f16(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -2; }
int launch_bf16(Kernel kernel, Divergence, const LaunchShape& shape, void*, const Params& params) {
  ++(kernel == Kernel::cluster ? cluster_launches : other_launches);
  kept_shape = shape;
  kept_params = params;
  return 0;
}

}  // namespace fused_kd

// Plan rows of bfloat16, one after another; a null pointer to weights turns that term off. Fills in
// the launch's parameters, and its grid, blocks of a cluster, threads and shared bytes of a block.
// Returns the size of the parameters; 0 unless there is one launch, of the cluster kernel.
extern "C" __attribute__((visibility("default"))) int capture(
    int64_t N, int64_t V, int divergence, double temperature, void* student, void* teacher,
    void* grad, const int64_t* labels, const float* w_hard, const float* w_soft, float* hard,
    float* soft, float* stats, void* params, int64_t* shape) {
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
  p.soft_factor = temperature * temperature;
  p.hard = hard;
  p.soft = soft;
  p.stats = stats;
  Device device = {};
  device.multiprocessors = 132;
  // shared memory of a block of which three or two share the 228 KiB of a multiprocessor
  device.bytes_of_three = 228 * 1024 / 3 - 1024;
  device.bytes_of_two = 228 * 1024 / 2 - 1024;
  device.cluster = 16;
  cluster_launches = other_launches = 0;
  if (launch_rows(p, device, nullptr, nullptr) || cluster_launches != 1 || other_launches) return 0;
  memcpy(params, &kept_params, sizeof(Params));
  shape[0] = kept_shape.grid;
  shape[1] = kept_shape.cluster;
  shape[2] = kept_shape.block;
  shape[3] = kept_shape.shared_bytes;
  return sizeof(Params);
}
