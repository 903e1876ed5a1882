// The operators of fused_kd/ops.py, the same for every backend of compiled kernels. Each checks the
// tensors, fills in a Problem and calls the kernels of a `Backend`, which defines
//     DEVICE                           the device's name in messages
//     is_here(tensor)                  whether the tensor is on such a device
//     same_device(a, b)                whether both tensors are on one device
//     Guard(tensor)                    an object that makes the tensor's device current
//     rows                             losses and statistics, and the gradient if there is one
//     gradient                         the gradient from the statistics
//     rescale, scale                   a gradient times a number
//     measure, measure_support         the columns and indices of kd_metrics
//     prepare_gradient(tensor)         called with the memory of a gradient before it is written
//
// LibTorch Stable ABI only (torch >= 2.10), so that one build serves several torch versions. Every
// check that protects memory is repeated here, since the operators can be called without the Python
// checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../problem.h"

namespace fused_kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the operators take besides tensors of rows. The temperature is a tensor in the schema, so
// that torch.compile does not compile again for each value.
struct Numbers {
  int64_t divergence;
  double temperature;
  double beta;
  bool scale_t2;
  double label_smoothing;

  Numbers(int64_t divergence, const Tensor& temperature, double beta, bool scale_t2,
          double label_smoothing)
      : divergence(divergence), beta(beta), scale_t2(scale_t2), label_smoothing(label_smoothing) {
    STD_TORCH_CHECK(temperature.is_cpu() && temperature.numel() == 1 &&
                        temperature.scalar_type() == ScalarType::Double,
                    "temperature must be one CPU float64");
    this->temperature = *static_cast<const double*>(temperature.const_data_ptr());
    STD_TORCH_CHECK(this->temperature > 0 && std::isfinite(this->temperature),
                    "temperature must be positive and finite");
  }
};

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// The addresses from the first element to the end of the last.
struct Extent {
  uintptr_t begin, end;
};
inline Extent extent_of(const Tensor& x) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  if (x.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return {begin, begin + (last + 1) * x.element_size()};
}

inline void check_apart(const Tensor& out, const char* out_name, const Tensor& x,
                        const char* name) {
  const Extent written = extent_of(out), read = extent_of(x);
  STD_TORCH_CHECK(written.end <= read.begin || read.end <= written.begin, out_name,
                  " shares memory with ", name);
}

template <class Backend>
struct Operators {
  using Losses = std::tuple<Tensor, Tensor, Tensor>;

  // ------------------------------------------------------------------------------- checks

  // (B, S, V) with last stride 1
  static Rows rows_of(const Tensor& x, const char* name, bool written = false) {
    STD_TORCH_CHECK(Backend::is_here(x), name, " must be a ", Backend::DEVICE, " tensor");
    STD_TORCH_CHECK(x.dim() == 3, name, " must be (B, S, V); got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.size(2) <= 1 || x.stride(2) == 1, name, " must have last stride 1; got ",
                    x.stride(2));
    const int64_t inner = x.size(1);
    void* data = written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
    return {data, dtype_of(x, name), inner > 0 ? inner : 1, x.stride(0), x.stride(1)};
  }

  template <class T>
  static T* vector_of(const OptionalTensor& x, int64_t n, ScalarType type, const char* name) {
    if (!x) return nullptr;
    STD_TORCH_CHECK(Backend::is_here(*x) && x->scalar_type() == type, name, " must be a ",
                    Backend::DEVICE, " tensor of ", type == ScalarType::Long ? "int64" : "float32");
    STD_TORCH_CHECK(x->is_contiguous() && x->numel() == n, name, " must be contiguous with ", n,
                    " elements; got ", x->numel());
    return static_cast<T*>(const_cast<void*>(x->const_data_ptr()));
  }

  static const float* number_of(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(Backend::is_here(x) && x.numel() == 1 && x.scalar_type() == ScalarType::Float,
                    name, " must be one ", Backend::DEVICE, " float32");
    return static_cast<const float*>(x.const_data_ptr());
  }

  static float* stats_of(const Tensor& stats, int64_t N, const Tensor& student) {
    STD_TORCH_CHECK(Backend::same_device(student, stats), "stats is on another device");
    return vector_of<float>(stats, N * STATS, ScalarType::Float, "stats");
  }

  // The teacher are the logits of the classes of a TopK: its tokens, and the tail.
  static void set_classes(Problem& p, const Tensor& token_ids, const Tensor& teacher) {
    p.K = teacher.size(2) - 1;
    STD_TORCH_CHECK(p.K >= 0 && p.teacher.dtype == Dtype::f32,
                    "with token_ids the teacher must be float32 (B, S, K+1)");
    STD_TORCH_CHECK(Backend::is_here(token_ids) && token_ids.scalar_type() == ScalarType::Int &&
                        token_ids.is_contiguous() && token_ids.numel() == p.N * p.K,
                    "token_ids must be a contiguous ", Backend::DEVICE, " int32 tensor (", p.N,
                    ", ", p.K, ")");
    p.has_classes = true;
    p.token_ids = static_cast<const int32_t*>(token_ids.const_data_ptr());
  }

  static Problem problem_of(const Tensor& student, const Tensor& teacher,
                            const OptionalTensor& token_ids, const OptionalTensor& labels,
                            const OptionalTensor& w_hard, const OptionalTensor& w_soft,
                            const Numbers& numbers) {
    Problem p{};
    p.student = rows_of(student, "student");
    p.teacher = rows_of(teacher, "teacher");
    for (int d = 0; d < (token_ids ? 2 : 3); ++d)
      STD_TORCH_CHECK(student.size(d) == teacher.size(d),
                      "student and teacher differ in dimension ", d, ": ", student.size(d), " and ",
                      teacher.size(d));
    p.N = student.size(0) * student.size(1);
    p.V = student.size(2);
    STD_TORCH_CHECK(p.V > 0, "the vocabulary is empty");
    if (token_ids) set_classes(p, *token_ids, teacher);
    STD_TORCH_CHECK(Backend::same_device(student, teacher), "teacher is on another device");
    for (const OptionalTensor* x : {&token_ids, &labels, &w_hard, &w_soft})
      STD_TORCH_CHECK(!*x || Backend::same_device(student, **x),
                      "token_ids, labels, w_hard and w_soft must be on the student's device");
    p.labels = vector_of<int64_t>(labels, p.N, ScalarType::Long, "labels");
    p.w_hard = vector_of<float>(w_hard, p.N, ScalarType::Float, "w_hard");
    p.w_soft = vector_of<float>(w_soft, p.N, ScalarType::Float, "w_soft");
    STD_TORCH_CHECK(!p.w_hard || p.labels, "a hard term needs labels");
    STD_TORCH_CHECK(numbers.divergence >= 0 && numbers.divergence < NUMBER_OF_DIVERGENCES,
                    "unknown divergence ", numbers.divergence);
    p.temperature = numbers.temperature;
    p.divergence = static_cast<Divergence>(numbers.divergence);
    const bool of_logits = !with_rule(p.divergence, [](auto rule) { return rule.SOFTMAX; });
    STD_TORCH_CHECK(!p.has_classes || !p.w_soft || !of_logits,
                    "a divergence of logits takes no token_ids");
    p.beta = numbers.beta;
    p.soft_factor = numbers.scale_t2 ? p.temperature * p.temperature : 1.0;
    p.label_smoothing = numbers.label_smoothing;
    return p;
  }

  // ------------------------------------------------------------------------------ results

  static Tensor new_gradient(const Tensor& student) {
    const int64_t B = student.size(0), S = student.size(1), V = student.size(2);
    Tensor grad = torch::stable::new_empty(student, {B, S, V});
    Backend::prepare_gradient(grad);
    return grad;
  }

  // The mutable pointer is taken first: that may copy storage which the tensor shares with another.
  static void over_student(Problem& p, const Tensor& student) {
    p.grad = p.student = rows_of(student, "student", true);
  }

  // Sets the gradient's memory, which is not that of the logits.
  static void over_gradient(Problem& p, const Tensor& grad, const Tensor& student) {
    p.grad = rows_of(grad, "grad", true);
    for (int d = 0; d < 3; ++d)
      STD_TORCH_CHECK(grad.size(d) == student.size(d), "grad must have the student's shape");
    STD_TORCH_CHECK(Backend::same_device(student, grad), "grad is on another device");
  }

  static Losses run_rows(Problem& p, const Tensor& student) {
    const typename Backend::Guard guard(student);
    Tensor hard = torch::stable::new_empty(student, {p.N}, ScalarType::Float);
    Tensor soft = torch::stable::new_empty(student, {p.N}, ScalarType::Float);
    Tensor stats = torch::stable::new_empty(student, {p.N, STATS}, ScalarType::Float);
    p.hard = static_cast<float*>(hard.mutable_data_ptr());
    p.soft = static_cast<float*>(soft.mutable_data_ptr());
    p.stats = static_cast<float*>(stats.mutable_data_ptr());
    if (p.N > 0) Backend::rows(p, student);
    return {hard, soft, stats};
  }

  static void run_gradient(Problem& p, const Tensor& stats, const Tensor& student) {
    const typename Backend::Guard guard(student);
    p.stats = stats_of(stats, p.N, student);
    if (p.N > 0) Backend::gradient(p, student);
  }

  // ---------------------------------------------------------------------------- operators

  static Losses forward(Tensor student, Tensor teacher, OptionalTensor token_ids,
                        OptionalTensor labels, OptionalTensor w_hard, OptionalTensor w_soft,
                        int64_t divergence, Tensor temperature, double beta, bool scale_t2,
                        double label_smoothing) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    return run_rows(p, student);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_backward(
      Tensor student, Tensor teacher, OptionalTensor token_ids, OptionalTensor labels,
      OptionalTensor w_hard, OptionalTensor w_soft, int64_t divergence, Tensor temperature,
      double beta, bool scale_t2, double label_smoothing) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    Tensor grad = new_gradient(student);
    p.grad = rows_of(grad, "grad", true);
    auto [hard, soft, stats] = run_rows(p, student);
    return {hard, soft, stats, grad};
  }

  // Writes the gradient to the caller's memory, rounded once to its dtype.
  static Losses forward_backward_into(Tensor student, Tensor teacher, OptionalTensor token_ids,
                                      OptionalTensor labels, OptionalTensor w_hard,
                                      OptionalTensor w_soft, int64_t divergence, Tensor temperature,
                                      double beta, bool scale_t2, double label_smoothing,
                                      Tensor grad) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    over_gradient(p, grad, student);
    STD_TORCH_CHECK(p.grad.dtype == p.student.dtype || p.student.dtype == Dtype::f32,
                    "grad must have the student's dtype, or 16 bits for a float32 student");
    check_apart(grad, "grad", student, "student");
    check_apart(grad, "grad", teacher, "teacher");
    Backend::prepare_gradient(grad);
    return run_rows(p, student);
  }

  // Writes the gradient over the student's logits.
  static Losses forward_backward_(Tensor student, Tensor teacher, OptionalTensor token_ids,
                                  OptionalTensor labels, OptionalTensor w_hard,
                                  OptionalTensor w_soft, int64_t divergence, Tensor temperature,
                                  double beta, bool scale_t2, double label_smoothing) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    over_student(p, student);
    return run_rows(p, student);
  }

  static Tensor backward(Tensor student, Tensor teacher, OptionalTensor token_ids,
                         OptionalTensor labels, OptionalTensor w_hard, OptionalTensor w_soft,
                         Tensor stats, int64_t divergence, Tensor temperature, double beta,
                         bool scale_t2, double label_smoothing) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    Tensor grad = new_gradient(student);
    p.grad = rows_of(grad, "grad", true);
    run_gradient(p, stats, student);
    return grad;
  }

  static void backward_(Tensor student, Tensor teacher, OptionalTensor token_ids,
                        OptionalTensor labels, OptionalTensor w_hard, OptionalTensor w_soft,
                        Tensor stats, int64_t divergence, Tensor temperature, double beta,
                        bool scale_t2, double label_smoothing) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    over_student(p, student);
    run_gradient(p, stats, student);
  }

  // Replaces a gradient for these weights by `scale` times it, rounded once: by multiplication if
  // that is exact (a power of two, or 0) or as accurate (float32), else from the logits.
  static void rescale_(Tensor student, Tensor teacher, OptionalTensor token_ids,
                       OptionalTensor labels, OptionalTensor w_hard, OptionalTensor w_soft,
                       Tensor stats, int64_t divergence, Tensor temperature, double beta,
                       bool scale_t2, double label_smoothing, Tensor scale, Tensor grad) {
    Problem p = problem_of(student, teacher, token_ids, labels, w_hard, w_soft,
                           {divergence, temperature, beta, scale_t2, label_smoothing});
    over_gradient(p, grad, student);
    STD_TORCH_CHECK(p.grad.dtype == p.student.dtype, "grad must have the student's dtype");
    p.stats = stats_of(stats, p.N, student);
    p.scale = number_of(scale, "scale");
    STD_TORCH_CHECK(Backend::same_device(student, scale), "scale is on another device");
    const typename Backend::Guard guard(student);
    if (p.N > 0) Backend::rescale(p, student);
  }

  // Multiplies a gradient in any layout of rows.
  static void scale_(Tensor grad, Tensor factor) {
    const float* scale = number_of(factor, "factor");
    const Rows rows = rows_of(grad, "grad", true);
    STD_TORCH_CHECK(Backend::same_device(grad, factor), "factor is on another device");
    const typename Backend::Guard guard(grad);
    if (grad.numel() > 0)
      Backend::scale(rows, grad.size(0) * grad.size(1), grad.size(2), scale, grad);
  }

  // The problem of a measurement: both terms are on in rows that have a weight.
  static Problem measured(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                          const Tensor& weight, const Tensor& temperature) {
    Problem p =
        problem_of(student, teacher, std::nullopt, labels, std::nullopt, std::nullopt,
                   {static_cast<int64_t>(Divergence::forward_kl), temperature, 0.5, true, 0.0});
    p.w_hard = p.w_soft = vector_of<float>(weight, p.N, ScalarType::Float, "weight");
    STD_TORCH_CHECK(Backend::same_device(student, weight), "weight is on another device");
    return p;
  }

  static std::tuple<Tensor, Tensor> measure(Tensor student, Tensor teacher, Tensor labels,
                                            Tensor weight, Tensor temperature) {
    const Problem p = measured(student, teacher, labels, weight, temperature);
    const typename Backend::Guard guard(student);
    Tensor sums = torch::stable::new_empty(student, {p.N, MEASURES}, ScalarType::Float);
    Tensor largest = torch::stable::new_zeros(student, {p.N, 2}, ScalarType::Long);
    if (p.N > 0)
      Backend::measure(p, static_cast<float*>(sums.mutable_data_ptr()),
                       static_cast<int64_t*>(largest.mutable_data_ptr()), student);
    return {sums, largest};
  }

  static std::tuple<Tensor, Tensor> measure_support(Tensor student, Tensor token_ids, Tensor labels,
                                                    Tensor weight, Tensor temperature) {
    Problem p = measured(student, student, labels, weight, temperature);
    STD_TORCH_CHECK(token_ids.dim() == 2, "token_ids must be (N, K)");
    const typename Backend::Guard guard(student);
    // all rows have the same classes, whose logits are 0: that the tail is one is all that counts
    const Tensor classes =
        torch::stable::new_zeros(student, {1, 1, token_ids.size(1) + 1}, ScalarType::Float);
    p.teacher = rows_of(classes, "classes");
    p.teacher.inner = 1;
    p.teacher.outer_stride = p.teacher.inner_stride = 0;
    set_classes(p, token_ids, classes);
    STD_TORCH_CHECK(Backend::same_device(student, token_ids),
                    "token_ids must be on the student's device");
    Tensor sums = torch::stable::new_empty(student, {p.N, SUPPORT_MEASURES}, ScalarType::Float);
    Tensor largest = torch::stable::new_zeros(student, {p.N}, ScalarType::Long);
    if (p.N > 0)
      Backend::measure_support(p, static_cast<float*>(sums.mutable_data_ptr()),
                               static_cast<int64_t*>(largest.mutable_data_ptr()), student);
    return {sums, largest};
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("forward", TORCH_BOX(&Operators::forward));
    library.impl("forward_backward", TORCH_BOX(&Operators::forward_backward));
    library.impl("forward_backward_", TORCH_BOX(&Operators::forward_backward_));
    library.impl("forward_backward_into", TORCH_BOX(&Operators::forward_backward_into));
    library.impl("backward", TORCH_BOX(&Operators::backward));
    library.impl("backward_", TORCH_BOX(&Operators::backward_));
    library.impl("rescale_", TORCH_BOX(&Operators::rescale_));
    library.impl("scale_", TORCH_BOX(&Operators::scale_));
    library.impl("measure", TORCH_BOX(&Operators::measure));
    library.impl("measure_support", TORCH_BOX(&Operators::measure_support));
  }
};

}  // namespace fused_kd
