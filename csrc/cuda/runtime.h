// What a binding queries from the CUDA runtime.
#pragma once

#include "launch.h"

namespace fused_kd {

// Describes the current device, whose index must be passed; queried once. Returns 0, or a CUDA
// error, for example if there are no kernels for the device.
int describe_device(int index, Device* device);
const char* error_text(int error);
// Returns the version of the toolkit that compiled this: 1000 * major + 10 * minor.
int toolkit();

}  // namespace fused_kd
