#include "classes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

namespace fused_kd {

namespace {

constexpr float INF = INFINITY;
constexpr float LOG2_E = 1.44269504088896340736f;

template <class Wide, class Narrow>
Wide element(const void* values, bool wide, int64_t i) {
  return wide ? static_cast<const Wide*>(values)[i] : static_cast<const Narrow*>(values)[i];
}

// Returns the sum of e^x over a row.
double mass_of(const float* x, int64_t size, const Kernels& kernels) {
  alignas(64) float block[BLOCK];
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, size - begin));
    const int padded = (n + MAX_PAIR - 1) / MAX_PAIR * MAX_PAIR;
    for (int i = 0; i < padded; ++i) block[i] = i < n ? std::max(x[begin + i], LOWEST) : LOWEST;
    BlockSums sums;
    kernels.sums(Load::f32_any, Divergence::none, Hard::power1,
                 {block, block, padded, 0, 0, LOG2_E, LOG2_E}, &sums);
    total += sums.d_1;
  }
  return total;
}

// Writes a row. `seen`: a bit for each entry of the vocabulary, all 0 before and after.
bool write_row(const TopKRows& p, int64_t n, const Kernels& kernels, std::vector<uint64_t>& seen) {
  float* const logits = p.logits + n * (p.K + 1);
  int32_t* const ids = p.token_ids + n * p.K;
  const int bytes = p.dtype == Dtype::f32 ? 4 : 2;
  const char* const logprobs = static_cast<const char*>(p.logprobs) + n * p.K * bytes;
  if (p.K > 0) kernels.widen(p.dtype, logprobs, logits, int(p.K));
  float largest = -INF;
  int64_t present = 0;
  for (int64_t i = 0; i < p.K; ++i) {
    ids[i] = -1;
    if (logits[i] == -INF) continue;
    const int64_t id = element<int64_t, int32_t>(p.ids, p.wide_ids, n * p.K + i);
    if (!(logits[i] < INF) || id < 0 || id >= p.V) return false;
    const uint64_t bit = uint64_t(1) << (id % 64);
    if (seen[id / 64] & bit) return false;
    seen[id / 64] |= bit;
    ids[i] = int32_t(id);
    largest = std::max(largest, logits[i]);
    ++present;
  }
  for (int64_t i = 0; i < p.K; ++i)
    if (ids[i] >= 0) seen[ids[i] / 64] = 0;
  double mass = p.slack < INF ? mass_of(logits, p.K, kernels) : 0;
  float tail = p.tail;
  if (p.tails) {
    tail = float(element<double, float>(p.tails, p.wide_tails, n));
    if (!(tail < INF)) return false;
    mass += std::exp(double(tail));
    if (present == p.V) tail = INF;
  }
  if (mass - 1 > p.slack) return false;
  if (present == 0) tail = 0;
  if (tail < INF) largest = std::max(largest, tail);
  for (int64_t i = 0; i < p.K; ++i) logits[i] = (logits[i] - largest) * p.temperature;
  logits[p.K] = (tail - largest) * p.temperature;
  return true;
}

struct Task {
  const TopKRows& rows;
  const Kernels& kernels;
  std::atomic<bool> refused;
};

void run(void* context, int64_t begin, int64_t end) {
  Task& task = *static_cast<Task*>(context);
  std::vector<uint64_t> seen((task.rows.V + 63) / 64);
  for (int64_t n = begin; n < end && !task.refused; ++n)
    if (!write_row(task.rows, n, task.kernels, seen)) task.refused = true;
}

}  // namespace

bool write_classes(const TopKRows& rows, const Parallel& parallel) {
  Task task{rows, kernels(), {false}};
  if (rows.N > 0) parallel.split(rows.N, &run, &task);
  return !task.refused;
}

}  // namespace fused_kd
