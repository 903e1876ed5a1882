// csrc/cuda/launching.h on a runtime that records its calls: what a kernel may use is
// set once for each device, to the most that the device has, regardless of the launch.
#include "../../csrc/cuda/launching.h"

#include <stdio.h>
#include <stdlib.h>

using namespace fused_kd;

struct Params {};
static void kernel(Params) {}
static void other(Params) {}

static void must(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "check_launching: %s\n", what);
  exit(1);
}

static int launched(void (*function)(Params), int kib, int cluster) {
  return launch_kernel(function, {16, 256, kib * 1024, cluster, 1}, nullptr, Params{});
}

int main() {
  must(launched(kernel, 1, 1) == 0 && runtime.set.empty(), "a small launch sets nothing");
  runtime.next_error = cudaErrorInvalidValue;
  must(launched(kernel, 100, 8) == cudaErrorInvalidValue, "an error is returned");
  must(runtime.last_error == cudaSuccess, "an error that was returned is not left behind");
  must(launched(kernel, 100, 8) == 0, "after an error, the next launch sets everything");
  must(runtime.set.size() == 3 && runtime.launches == 2, "three attributes are set");
  // another thread's launch of less memory must not lower what is allowed between them
  must(launched(kernel, 60, 16) == 0 && launched(kernel, 227, 16) == 0, "any size can be launched");
  must(runtime.set.size() == 3, "once for each kernel and device");
  must(launched(other, 227, 1) == 0 && runtime.set.size() == 6, "for every kernel");
  runtime.device = 1;
  must(launched(kernel, 99, 8) == 0 && runtime.set.size() == 9, "for every device");
  must(launched(kernel, 100, 8) == cudaErrorInvalidValue, "to what that device has");
  puts("ok");
}
