// The operators on CPU tensors.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../cpu/measure.h"
#include "../cpu/rows.h"
#include "operators.h"
#include "parallel.h"

namespace {

using namespace fused_kd;

struct Cpu {
  static constexpr const char* DEVICE = "CPU";

  static bool is_here(const Tensor& x) { return x.is_cpu(); }

  static bool same_device(const Tensor&, const Tensor&) { return true; }

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void rows(const Problem& p, const Tensor&) { rows_forward(p, torch_threads()); }

  static void gradient(const Problem& p, const Tensor&) { rows_backward(p, torch_threads()); }

  static void rescale(const Problem& p, const Tensor& student) {
    int exponent;
    const float mantissa = std::fabs(std::frexp(*p.scale, &exponent));
    if (p.grad.dtype == Dtype::f32 || mantissa == 0.5f || mantissa == 0.0f)
      scale(p.grad, p.N, p.V, p.scale, student);
    else
      rows_backward(p, torch_threads());
  }

  static void scale(const Rows& grad, int64_t N, int64_t V, const float* factor, const Tensor&) {
    if (*factor == 1.0f) return;
    torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) scale_row(grad, n, V, *factor);
    });
  }

  static void measure(const Problem& p, float* sums, int64_t* largest, const Tensor&) {
    measure_rows(p, sums, largest, torch_threads());
  }

  static void measure_support(const Problem& p, float* sums, int64_t* largest, const Tensor&) {
    fused_kd::measure_support(p, sums, largest, torch_threads());
  }

  // Page faults of a newly allocated large gradient cost more than the kernel that fills it:
  // request huge pages if the system leaves that to the application.
  static void prepare_gradient(const Tensor& grad, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t address = reinterpret_cast<uintptr_t>(grad.const_data_ptr());
    const uintptr_t begin = (address + 4095) & ~uintptr_t(4095);
    const uintptr_t end = (address + bytes) & ~uintptr_t(4095);
    if (end > begin + 2 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CPU, library) { Operators<Cpu>::implement(library); }
