// The Python module fused_kd._C: importing it registers the operators; it also tells how it was
// built and lets tests put numbers through single row kernels, as numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "../cpu/product.h"
#include "../cpu/rows.h"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

#ifndef FUSED_KD_TORCH_VERSION
#define FUSED_KD_TORCH_VERSION "unknown"
#endif

static py::dict build_info() {
  py::dict info;
  int count;
  const fused_kd::Candidate* all = fused_kd::candidates(&count);
  py::dict sets;
  for (int i = 0; i < count; ++i) sets[all[i].name] = all[i].runs;
  info["compiler"] = __VERSION__;
  info["built_with_torch"] = FUSED_KD_TORCH_VERSION;
  info["instruction_sets"] = sets;
  info["instruction_set"] = fused_kd::kernels().name;
  info["product_bytes_per_thread"] = fused_kd::product_bytes();
  return info;
}

// Statistics and losses of rows, without torch: float32 (N, V) student and teacher, int64 (N,)
// labels.
static py::dict probe_rows(FloatArray student, FloatArray teacher,
                           py::array_t<int64_t, py::array::c_style | py::array::forcecast> labels,
                           int divergence, double temperature, double beta, double soft_factor,
                           double label_smoothing) {
  if (student.ndim() != 2 || teacher.ndim() != 2 || student.shape(0) != teacher.shape(0) ||
      student.shape(1) != teacher.shape(1))
    throw py::value_error("student and teacher must be (N, V) of the same shape");
  if (labels.ndim() != 1 || labels.shape(0) != student.shape(0))
    throw py::value_error("labels must be (N,)");
  if (divergence < 0 || divergence > 4) throw py::value_error("divergence must be 0 to 4");
  const py::ssize_t N = student.shape(0), V = student.shape(1);
  FloatArray hard(N), soft(N), stats({N, py::ssize_t(fused_kd::STATS)}), grad({N, V}), weights(N);
  std::fill_n(weights.mutable_data(), N, 1.0f);
  fused_kd::Problem p{};
  p.N = N;
  p.V = V;
  p.student = {const_cast<float*>(student.data()), fused_kd::Dtype::f32, 1, V, V};
  p.teacher = {const_cast<float*>(teacher.data()), fused_kd::Dtype::f32, 1, V, V};
  p.grad = {grad.mutable_data(), fused_kd::Dtype::f32, 1, V, V};
  p.labels = labels.data();
  p.w_hard = p.w_soft = weights.data();
  p.divergence = static_cast<fused_kd::Divergence>(divergence);
  p.temperature = temperature;
  p.beta = beta;
  p.soft_factor = soft_factor;
  p.label_smoothing = label_smoothing;
  p.hard = hard.mutable_data();
  p.soft = soft.mutable_data();
  p.stats = stats.mutable_data();
  const fused_kd::Parallel serial{
      [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); },
      1};
  fused_kd::rows_forward(p, serial);
  py::dict out;
  out["hard"] = hard;
  out["soft"] = soft;
  out["stats"] = stats;
  out["grad"] = grad;
  return out;
}

// float32 -> bfloat16 or half bits -> float32, as the kernels convert.
static FloatArray probe_round_trip(FloatArray values, const std::string& dtype) {
  const fused_kd::Dtype type = dtype == "bf16" ? fused_kd::Dtype::bf16 : fused_kd::Dtype::f16;
  const fused_kd::Kernels& table = fused_kd::kernels();
  FloatArray out(values.size());
  std::vector<uint16_t> packed(values.size());
  table.narrow(type, values.data(), packed.data(), int(values.size()));
  table.widen(type, packed.data(), out.mutable_data(), int(values.size()));
  return out;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of fused_kd for the CPU.";
  module.def("build_info", &build_info);
  module.def(
      "choose_instruction_set",
      [](const std::string& name) { fused_kd::choose_kernels(name.c_str()); }, py::arg("name"));
  module.def("probe_rows", &probe_rows, py::arg("student"), py::arg("teacher"), py::arg("labels"),
             py::kw_only(), py::arg("divergence") = 0, py::arg("temperature") = 1.0,
             py::arg("beta") = 0.5, py::arg("soft_factor") = 1.0, py::arg("label_smoothing") = 0.0);
  module.def("probe_round_trip", &probe_round_trip, py::arg("values"), py::arg("dtype"));
}
