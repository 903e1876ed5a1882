// The operator product_ on CPU matrices; fused_kd/ops.py documents it.
#include "../cpu/huge_pages.h"
#include "../cpu/product.h"
#include "operators.h"
#include "parallel.h"

namespace {

using namespace fused_kd;

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix; got ", x.dim(), " dimensions");
}

Operand operand_of(const Tensor& x, const char* name) {
  // the stride of a dimension of size 1 is never used
  const int64_t row_stride = x.size(0) > 1 ? x.stride(0) : 1;
  const int64_t column_stride = x.size(1) > 1 ? x.stride(1) : 1;
  STD_TORCH_CHECK(row_stride == 1 || column_stride == 1, name,
                  " must have stride 1 in one dimension; got strides ", row_stride, " and ",
                  column_stride);
  return {x.const_data_ptr(), dtype_of(x, name), row_stride, column_stride};
}

Dtype rounding_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "round_to must be float32, bfloat16 or float16");
  }
}

const float* bias_of(const OptionalTensor& bias, int64_t columns) {
  if (!bias) return nullptr;
  STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float,
                  "bias must be a float32 CPU tensor");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous(),
                  "bias must be contiguous with one entry for each of the ", columns, " columns");
  return static_cast<const float*>(bias->const_data_ptr());
}

void product_(Tensor out, Tensor a, Tensor b, OptionalTensor bias, ScalarType round_to,
              bool round_a, bool accumulate) {
  Product p{};
  check_matrix(out, "out");
  check_matrix(a, "a");
  check_matrix(b, "b");
  p.M = a.size(0);
  p.K = a.size(1);
  p.N = b.size(1);
  STD_TORCH_CHECK(b.size(0) == p.K, "b must have a row for each column of a, ", p.K, "; got ",
                  b.size(0));
  STD_TORCH_CHECK(out.size(0) == p.M && out.size(1) == p.N, "out must be (", p.M, ", ", p.N,
                  "); got (", out.size(0), ", ", out.size(1), ")");
  p.c_dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(!accumulate || p.c_dtype == Dtype::f32,
                  "out must be float32 if the product is added to it");
  STD_TORCH_CHECK(p.N <= 1 || out.stride(1) == 1, "out must have last stride 1; got ",
                  out.stride(1));
  STD_TORCH_CHECK(p.M <= 1 || out.stride(0) >= p.N, "the rows of out overlap: stride ",
                  out.stride(0), " for ", p.N, " columns");
  STD_TORCH_CHECK(!(bias && accumulate), "bias and accumulate exclude each other");
  p.round_to = rounding_of(round_to);
  p.round_a = round_a;
  p.accumulate = accumulate;
  // first, since taking the mutable pointer may copy storage that `out` shares with another tensor
  p.c = out.mutable_data_ptr();
  p.c_stride = p.M > 1 ? out.stride(0) : p.N;
  p.a = operand_of(a, "a");
  p.b = operand_of(b, "b");
  p.bias = bias_of(bias, p.N);
  check_apart(out, "out", a, "a");
  check_apart(out, "out", b, "b");
  if (bias) check_apart(out, "out", *bias, "bias");
  const Extent written = extent_of(out);
  request_huge_pages(written.begin, written.end);
  multiply(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CPU, library) {
  library.impl("product_", TORCH_BOX(&product_));
}
