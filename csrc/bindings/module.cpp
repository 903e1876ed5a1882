// The Python module fused_kd._C, whose import registers the operators on CPU tensors. It also
// reports how it was built, and selects an instruction set for tests.
#include <pybind11/pybind11.h>

#include "../cpu/product.h"
#include "../cpu/rows.h"
#include "build_info.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info = fused_kd::common_build_info();
  info["instruction_set"] = fused_kd::instruction_set();  // first: it may find that one cannot run
  int count;
  const fused_kd::Candidate* all = fused_kd::candidates(&count);
  pybind11::dict sets;
  for (int i = 0; i < count; ++i) sets[all[i].name] = all[i].runs.load();
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = sets;
  info["product_bytes_per_thread"] = fused_kd::product_bytes();
  info["product_sum_bytes_per_thread"] = fused_kd::product_sum_bytes();
  info["product_multiplies_pairs"] = fused_kd::multiplies_pairs();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of fused_kd for the CPU.";
  module.def("build_info", &build_info);
  module.def(
      "choose_instruction_set",
      [](const std::string& name) { fused_kd::choose_kernels(name.c_str()); },
      pybind11::arg("name"));
}
