// The build information that both compiled modules report.
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
  info["row_statistics"] = STATS;  // must equal that of the Python side, as the divergences
  pybind11::list divergences;
#define FUSED_KD_APPEND(name) divergences.append(#name);
  FUSED_KD_DIVERGENCES(FUSED_KD_APPEND)
#undef FUSED_KD_APPEND
  info["divergences"] = divergences;
  return info;
}

}  // namespace fused_kd
