// The operators of fused_kd/ops.py on CPU tensors: check, describe the tensors to the row kernels,
// call them.
//
// LibTorch Stable ABI only (torch >= 2.10): one build serves several torch versions. Every check
// that protects memory is repeated here, since the operators can be called without the Python
// checks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../cpu/rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Numbers {
  int64_t divergence;
  double temperature, beta, soft_factor, label_smoothing;
};

fused_kd::Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return fused_kd::Dtype::f32;
    case ScalarType::BFloat16: return fused_kd::Dtype::bf16;
    case ScalarType::Half: return fused_kd::Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// (B, S, V) with last stride 1
fused_kd::Rows rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 3, name, " must be (B, S, V); got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.size(2) <= 1 || x.stride(2) == 1, name, " must have last stride 1; got ",
                  x.stride(2));
  const int64_t inner = x.size(1);
  return {const_cast<void*>(x.const_data_ptr()), dtype_of(x, name), inner > 0 ? inner : 1,
          x.stride(0), x.stride(1)};
}

template <class T>
T* vector_of(const OptionalTensor& x, int64_t n, ScalarType type, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == type, name, " has the wrong device or dtype");
  STD_TORCH_CHECK(x->is_contiguous() && x->numel() == n, name, " must be contiguous with ", n,
                  " elements; got ", x->numel());
  return static_cast<T*>(const_cast<void*>(x->const_data_ptr()));
}

fused_kd::Problem problem_of(const Tensor& student, const Tensor& teacher,
                             const OptionalTensor& labels, const OptionalTensor& w_hard,
                             const OptionalTensor& w_soft, const Numbers& numbers) {
  fused_kd::Problem p{};
  p.student = rows_of(student, "student");
  p.teacher = rows_of(teacher, "teacher");
  for (int d = 0; d < 3; ++d)
    STD_TORCH_CHECK(student.size(d) == teacher.size(d), "student and teacher differ in dimension ",
                    d, ": ", student.size(d), " and ", teacher.size(d));
  p.N = student.size(0) * student.size(1);
  p.V = student.size(2);
  STD_TORCH_CHECK(p.V > 0, "the vocabulary is empty");
  p.labels = vector_of<int64_t>(labels, p.N, ScalarType::Long, "labels");
  p.w_hard = vector_of<float>(w_hard, p.N, ScalarType::Float, "w_hard");
  p.w_soft = vector_of<float>(w_soft, p.N, ScalarType::Float, "w_soft");
  STD_TORCH_CHECK(!p.w_hard || p.labels, "a hard term needs labels");
  STD_TORCH_CHECK(numbers.divergence >= 0 && numbers.divergence < 5, "unknown divergence ",
                  numbers.divergence);
  STD_TORCH_CHECK(numbers.temperature > 0 && std::isfinite(numbers.temperature),
                  "temperature must be positive and finite");
  p.divergence = static_cast<fused_kd::Divergence>(numbers.divergence);
  p.temperature = numbers.temperature;
  p.beta = numbers.beta;
  p.soft_factor = numbers.soft_factor;
  p.label_smoothing = numbers.label_smoothing;
  return p;
}

fused_kd::Parallel parallel() {
  auto split = [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {split, static_cast<int>(torch::stable::get_num_threads())};
}

// Page faults of a fresh large gradient cost more than the kernel that fills it: ask for huge pages
// where the system leaves it to us.
void advise_huge_pages(const Tensor& x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(x.const_data_ptr()) + 4095) & ~uintptr_t(4095);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(x.const_data_ptr()) + bytes) & ~uintptr_t(4095);
  if (end > begin + 2 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor new_gradient(const Tensor& student) {
  const int64_t B = student.size(0), S = student.size(1), V = student.size(2);
  Tensor grad = torch::stable::new_empty(student, {B, S, V});
  advise_huge_pages(grad, B * S * V * (student.scalar_type() == ScalarType::Float ? 4 : 2));
  return grad;
}

Tensor new_vector(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> run_forward(fused_kd::Problem& p, const Tensor& student) {
  Tensor hard = new_vector(student, p.N), soft = new_vector(student, p.N);
  Tensor stats = torch::stable::new_empty(student, {p.N, fused_kd::STATS}, ScalarType::Float);
  p.hard = static_cast<float*>(hard.mutable_data_ptr());
  p.soft = static_cast<float*>(soft.mutable_data_ptr());
  p.stats = static_cast<float*>(stats.mutable_data_ptr());
  fused_kd::rows_forward(p, parallel());
  return {hard, soft, stats};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor student, Tensor teacher, OptionalTensor labels,
                                           OptionalTensor w_hard, OptionalTensor w_soft,
                                           int64_t divergence, double temperature, double beta,
                                           double soft_factor, double label_smoothing) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  return run_forward(p, student);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_backward(
    Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor w_hard,
    OptionalTensor w_soft, int64_t divergence, double temperature, double beta, double soft_factor,
    double label_smoothing) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  Tensor grad = new_gradient(student);
  p.grad = rows_of(grad, "grad");
  auto [hard, soft, stats] = run_forward(p, student);
  return {hard, soft, stats, grad};
}

// The gradient over the student's own memory.
std::tuple<Tensor, Tensor, Tensor> forward_backward_(Tensor student, Tensor teacher,
                                                     OptionalTensor labels, OptionalTensor w_hard,
                                                     OptionalTensor w_soft, int64_t divergence,
                                                     double temperature, double beta,
                                                     double soft_factor, double label_smoothing) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  p.grad = p.student;
  return run_forward(p, student);
}

float* stats_of(const Tensor& stats, int64_t N) {
  return vector_of<float>(stats, N * fused_kd::STATS, ScalarType::Float, "stats");
}

void run_backward(fused_kd::Problem& p, const Tensor& stats) {
  p.stats = stats_of(stats, p.N);
  fused_kd::rows_backward(p, parallel());
}

Tensor backward(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor w_hard,
                OptionalTensor w_soft, Tensor stats, int64_t divergence, double temperature,
                double beta, double soft_factor, double label_smoothing) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  Tensor grad = new_gradient(student);
  p.grad = rows_of(grad, "grad");
  run_backward(p, stats);
  return grad;
}

void backward_(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor w_hard,
               OptionalTensor w_soft, Tensor stats, int64_t divergence, double temperature,
               double beta, double soft_factor, double label_smoothing) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  p.grad = p.student;
  run_backward(p, stats);
}

float number_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == 1 && x.scalar_type() == ScalarType::Float, name,
                  " must be one CPU float32");
  return *static_cast<const float*>(x.const_data_ptr());
}

// A gradient in contiguous (B, S, V) or, in place, in the student's layout, times a number.
void scale_(Tensor grad, Tensor factor) {
  const float value = number_of(factor, "factor");
  const fused_kd::Rows rows = rows_of(grad, "grad");
  if (value == 1.0f) return;
  const int64_t N = grad.size(0) * grad.size(1), V = grad.size(2);
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) fused_kd::scale_row(rows, n, V, value);
  });
}

// A gradient made with these weights becomes `scale` times it, rounded once: by multiplication where
// that is exact (a power of two, 0 too) or as good (float32), else from the logits.
void rescale_(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor w_hard,
              OptionalTensor w_soft, Tensor stats, int64_t divergence, double temperature,
              double beta, double soft_factor, double label_smoothing, Tensor scale, Tensor grad) {
  fused_kd::Problem p = problem_of(student, teacher, labels, w_hard, w_soft,
                                   {divergence, temperature, beta, soft_factor, label_smoothing});
  p.grad = rows_of(grad, "grad");
  STD_TORCH_CHECK(p.grad.dtype == p.student.dtype, "grad must have the student's dtype");
  for (int d = 0; d < 3; ++d)
    STD_TORCH_CHECK(grad.size(d) == student.size(d), "grad must have the student's shape");
  p.stats = stats_of(stats, p.N);
  const float value = number_of(scale, "scale");
  p.scale = &value;
  int exponent;
  const float mantissa = std::fabs(std::frexp(value, &exponent));
  if (p.grad.dtype == fused_kd::Dtype::f32 || mantissa == 0.5f || mantissa == 0.0f)
    scale_(grad, scale);
  else
    fused_kd::rows_backward(p, parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("forward_backward", TORCH_BOX(&forward_backward));
  library.impl("forward_backward_", TORCH_BOX(&forward_backward_));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("backward_", TORCH_BOX(&backward_));
  library.impl("rescale_", TORCH_BOX(&rescale_));
  library.impl("scale_", TORCH_BOX(&scale_));
}
