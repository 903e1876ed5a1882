// Queries of a binding to the CUDA runtime itself.
#pragma once

#include "launch.h"

namespace fused_kd {

// Returns 0, or a CUDA error, also if there are no kernels for the device. It must be the current
// one; it is queried once.
int describe_device(int index, Device* device);
const char* error_text(int error);
// Of the toolkit that compiled this: 1000 * major + 10 * minor.
int toolkit();

}  // namespace fused_kd
