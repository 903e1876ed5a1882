// What both compiled modules report of themselves.
#pragma once

#include <pybind11/pybind11.h>

#include "../problem.h"

#ifndef FUSED_KD_TORCH_VERSION
#define FUSED_KD_TORCH_VERSION "unknown"
#endif

namespace fused_kd {

inline pybind11::dict common_build_info() {
  pybind11::dict info;
  info["built_with_torch"] = FUSED_KD_TORCH_VERSION;
  info["row_statistics"] = STATS;  // must be the Python side's
  return info;
}

}  // namespace fused_kd
