// The operators on CUDA tensors, and the module fused_kd._cuda, whose import registers them. No
// function here synchronizes with the device.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launch.h"
#include "../cuda/runtime.h"
#include "build_info.h"
#include "operators.h"

#ifndef FUSED_KD_ARCHITECTURES
#define FUSED_KD_ARCHITECTURES "unknown"
#endif

namespace {

using namespace fused_kd;

void check(int error) {
  STD_TORCH_CHECK(error == 0,
                  "a CUDA kernel of fused_kd could not be launched: ", error_text(error),
                  " (error ", error, ")");
}

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Device device_of(const Tensor& x) {
  Device device;
  check(describe_device(x.get_device_index(), &device));
  return device;
}

void check_size(int64_t N, int64_t V) {
  STD_TORCH_CHECK(N <= MAX_N && V <= MAX_V, "at most ", MAX_N, " rows of ", MAX_V, " entries; got ",
                  N, " of ", V);
}

struct Cuda {
  static constexpr const char* DEVICE = "CUDA";

  static bool is_here(const Tensor& x) { return x.is_cuda(); }

  static bool same_device(const Tensor& a, const Tensor& b) {
    return a.get_device_index() == b.get_device_index();
  }

  struct Guard {
    torch::stable::accelerator::DeviceGuard guard;
    explicit Guard(const Tensor& x) : guard(x.get_device_index()) {}
  };

  static void rows(const Problem& p, const Tensor& student) {
    check_size(p.N, p.V);
    const Device device = device_of(student);
    const int64_t bytes = workspace_bytes(p, device);
    const Tensor workspace = torch::stable::new_empty(student, {bytes}, ScalarType::Byte);
    void* memory = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
    check(launch_rows(p, device, memory, stream_of(student)));
  }

  static void gradient(const Problem& p, const Tensor& student) {
    check_size(p.N, p.V);
    check(launch_gradient(p, device_of(student), stream_of(student)));
  }

  static void rescale(const Problem& p, const Tensor& student) {
    check_size(p.N, p.V);
    check(launch_rescale(p, device_of(student), stream_of(student)));
  }

  static void scale(const Rows& grad, int64_t N, int64_t V, const float* factor, const Tensor& x) {
    check_size(N, V);
    check(launch_scale(grad, N, V, factor, device_of(x), stream_of(x)));
  }

  static void measure(const Problem& p, float* sums, int64_t* largest, const Tensor& student) {
    Problem q = p;
    const auto results = Operators<Cuda>::run_rows(q, student);  // alive until the launch
    check(launch_measure(q, sums, largest, stream_of(student)));
  }

  static void measure_support(const Problem& p, float* sums, int64_t* largest,
                              const Tensor& student) {
    check_size(p.N, p.V);
    check(launch_measure(p, sums, largest, stream_of(student)));
  }

  static void prepare_gradient(const Tensor&) {}
};

pybind11::dict build_info() {
  pybind11::dict info = common_build_info();
  info["cuda_toolkit"] = toolkit();
  info["architectures"] = FUSED_KD_ARCHITECTURES;
  return info;
}

// Returns the properties of the current device on which a launch depends.
pybind11::dict device(int index) {
  Device properties;
  const int error = describe_device(index, &properties);
  if (error) throw std::runtime_error(std::string("CUDA device: ") + error_text(error));
  pybind11::dict info;
  info["multiprocessors"] = properties.multiprocessors;
  info["largest_cluster"] = properties.cluster;
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CUDA, library) { Operators<Cuda>::implement(library); }

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled kernels of fused_kd for CUDA devices.";
  module.def("build_info", &build_info);
  module.def("device", &device, pybind11::arg("index"));
}
