// The operator classes_ on CPU tensors; fused_kd/ops.py documents it.
#include "../cpu/classes.h"
#include "operators.h"
#include "parallel.h"

namespace {

using namespace fused_kd;

void check(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, " must be a contiguous CPU tensor");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must be (",
                  rows, ", ", columns, ")");
}

bool is_wide(const Tensor& x, const char* name, ScalarType wide, ScalarType narrow) {
  STD_TORCH_CHECK(x.scalar_type() == wide || x.scalar_type() == narrow, name,
                  " has an unknown element type");
  return x.scalar_type() == wide;
}

bool classes_(Tensor logits, Tensor out_ids, Tensor token_ids, Tensor logprobs,
              OptionalTensor tail_logprob, double tail, int64_t vocabulary, double temperature,
              double slack) {
  TopKRows p{};
  STD_TORCH_CHECK(logprobs.dim() == 2, "logprobs must be (N, K)");
  p.N = logprobs.size(0);
  p.K = logprobs.size(1);
  p.V = vocabulary;
  STD_TORCH_CHECK(p.V >= 0 && p.V <= int64_t(1) << 31, "vocabulary must be in [0, 2**31]");
  check(logprobs, "logprobs", p.N, p.K);
  check(token_ids, "token_ids", p.N, p.K);
  check(out_ids, "out_ids", p.N, p.K);
  check(logits, "logits", p.N, p.K + 1);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be float32");
  STD_TORCH_CHECK(out_ids.scalar_type() == ScalarType::Int, "out_ids must be int32");
  if (tail_logprob) {
    STD_TORCH_CHECK(
        tail_logprob->is_cpu() && tail_logprob->is_contiguous() && tail_logprob->numel() == p.N,
        "tail_logprob must be a contiguous CPU tensor of N values");
    p.wide_tails = is_wide(*tail_logprob, "tail_logprob", ScalarType::Double, ScalarType::Float);
    p.tails = tail_logprob->const_data_ptr();
  }
  p.wide_ids = is_wide(token_ids, "token_ids", ScalarType::Long, ScalarType::Int);
  p.dtype = dtype_of(logprobs, "logprobs");
  p.tail = float(tail);
  p.temperature = float(temperature);
  p.slack = slack;
  p.logits = static_cast<float*>(logits.mutable_data_ptr());
  p.token_ids = static_cast<int32_t*>(out_ids.mutable_data_ptr());
  p.logprobs = logprobs.const_data_ptr();
  p.ids = token_ids.const_data_ptr();
  check_apart(logits, "logits", logprobs, "logprobs");
  check_apart(out_ids, "out_ids", token_ids, "token_ids");
  return write_classes(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_kd, CPU, library) {
  library.impl("classes_", TORCH_BOX(&classes_));
}
