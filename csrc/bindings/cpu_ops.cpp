// The operators on CPU tensors.
#include "../cpu/huge_pages.h"
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

  static void prepare_gradient(const Tensor& grad) {
    const Extent memory = extent_of(grad);
    request_huge_pages(memory.begin, memory.end);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CPU, library) { Operators<Cpu>::implement(library); }
