// The tokens of a top-k teacher's row: where they are, and the student's logits there.
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"

namespace fused_kd {
namespace cpu {

// Present tokens are grouped by the block of the vocabulary that contains them.
class Support {
 public:
  struct Token {
    int32_t id, position;  // the position is that among the row's K
    float s;               // the student's logit
  };
  struct Group {
    const Token *begin_, *end_;
    const Token* begin() const { return begin_; }
    const Token* end() const { return end_; }
    int size() const { return int(end_ - begin_); }
  };

  // Set by the caller: the logit that the plain kernels read in place of each token's, NaN: none; and
  // whether it was written over them in the row's memory.
  float low = NAN;
  bool is_lowered = false;

  // ids: K of a row with V entries; those outside [0, V) are absent. read(id): the student's logit.
  template <class Read>
  void set(const int32_t* ids, int64_t K, int64_t V, Read read) {
    low = NAN;
    is_lowered = false;
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    first_.assign(blocks + 2, 0);
    int64_t count = 0;
    for (int64_t i = 0; i < K; ++i)
      if (is_present(ids[i], V)) ++first_[ids[i] / BLOCK + 2], ++count;
    for (int64_t b = 2; b < blocks + 2; ++b) first_[b] += first_[b - 1];
    tokens_.resize(count);
    for (int64_t i = 0; i < K; ++i)  // afterwards first_[b] is where block b begins
      if (is_present(ids[i], V))
        tokens_[first_[ids[i] / BLOCK + 1]++] = {ids[i], int32_t(i), read(ids[i])};
  }

  Group all() const { return {tokens_.data(), tokens_.data() + tokens_.size()}; }
  Group in_block(int64_t begin) const {
    const int64_t b = begin / BLOCK;
    return {tokens_.data() + first_[b], tokens_.data() + first_[b + 1]};
  }

 private:
  static bool is_present(int32_t id, int64_t V) { return id >= 0 && id < V; }

  std::vector<Token> tokens_;
  std::vector<int32_t> first_;
};

}  // namespace cpu
}  // namespace fused_kd
