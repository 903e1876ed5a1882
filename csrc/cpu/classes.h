// The classes of a top-k teacher (fused_kd/classes.py), from its rows, after one check of each value.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace fused_kd {

// N contiguous rows of K entries.
struct TopKRows {
  int64_t N, K, V;
  const void* ids;       // (N, K)
  bool wide_ids;         // int64, else int32
  const void* logprobs;  // (N, K)
  Dtype dtype;
  const void* tails;  // (N), or null: `tail` for every row
  bool wide_tails;    // double, else float
  float tail;
  float temperature;
  double slack;  // a row's probabilities may add up to 1 and this; infinite: to anything
  // outputs
  float* logits;       // (N, K+1)
  int32_t* token_ids;  // (N, K)
};

// Writes the classes. Returns false, and what it wrote is of no use, if a value must be refused.
bool write_classes(const TopKRows& rows, const Parallel& parallel);

}  // namespace fused_kd
