// Divides a product among threads: a grid of regions of C, each with its own packed blocks.
#include "product.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace fused_kd {

namespace {

constexpr int64_t LINE = 64;
// The time of packing an element, in multiply-adds.
constexpr int64_t PACKING = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  int64_t rows, columns;          // regions
  int64_t row_step, column_step;  // of C in each
};

// Returns the grid whose regions take the least time. K is never divided.
Grid grid_of(const Product& p, const ProductKernels& kernels, int64_t threads) {
  const int64_t row_tiles = ceil_div(p.M, kernels.rows);
  const int64_t column_tiles = ceil_div(p.N, kernels.columns);
  Grid best{};
  int64_t least = 0;
  for (int64_t rows = 1; rows <= std::min(threads, row_tiles); ++rows) {
    const int64_t columns = std::min(threads / rows, column_tiles);
    const int64_t row_step = ceil_div(row_tiles, rows) * kernels.rows;
    const int64_t column_step = ceil_div(column_tiles, columns) * kernels.columns;
    const int64_t time = row_step * column_step + PACKING * (row_step + column_step);
    if (best.rows == 0 || time < least) {
      best = {ceil_div(p.M, row_step), ceil_div(p.N, column_step), row_step, column_step};
      least = time;
    }
  }
  return best;
}

struct Task {
  const Product& product;
  const ProductKernels& kernels;
  Grid grid;
};

void run(void* context, int64_t begin, int64_t end) {
  const auto& [p, kernels, grid] = *static_cast<const Task*>(context);
  // the regions differ in size at the edges of C alone
  const int64_t bytes = kernels.needs(p, {0, grid.row_step, 0, grid.column_step});
  const std::unique_ptr<char[]> memory(new char[bytes + LINE]);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory.get()) + LINE - 1) & -LINE;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / grid.columns * grid.row_step;
    const int64_t column = i % grid.columns * grid.column_step;
    const Region region{row, std::min(grid.row_step, p.M - row), column,
                        std::min(grid.column_step, p.N - column)};
    kernels.multiply(p, region, reinterpret_cast<float*>(aligned));
  }
}

}  // namespace

void multiply(const Product& p, const Parallel& parallel) {
  if (p.M == 0 || p.N == 0) return;
  const ProductKernels& kernels = product_kernels();
  Task task{p, kernels, grid_of(p, kernels, std::max(parallel.threads, 1))};
  parallel.split(task.grid.rows * task.grid.columns, run, &task);
}

bool agree(const ProductKernels& first, const ProductKernels& second) {
  constexpr int64_t M = 40, N = 45, K = 70;  // tiles of every size at the edges
  std::vector<uint16_t> a(M * K), b(K * N);  // bfloat16
  uint32_t random = 1;
  for (std::vector<uint16_t>* operand : {&a, &b})
    for (uint16_t& element : *operand) {
      random = random * 1664525 + 1013904223;
      const float value = float(random >> 24) - 128;
      uint32_t word;
      memcpy(&word, &value, sizeof word);
      element = uint16_t(word >> 16);
    }
  std::vector<float> results[2];
  for (std::vector<float>& c : results) {
    const ProductKernels& kernels = &c == results ? first : second;
    c.resize(M * N);
    Product p{};
    p.M = M, p.N = N, p.K = K;
    p.a = {a.data(), Dtype::bf16, K, 1};
    p.b = {b.data(), Dtype::bf16, 1, K};
    p.round_to = Dtype::bf16;
    p.c = c.data();
    p.c_stride = N;
    Task whole{p, kernels, {1, 1, M, N}};
    run(&whole, 0, 1);
  }
  return results[0] == results[1];
}

int64_t product_bytes() { return product_kernels().bytes + LINE; }
int64_t product_sum_bytes() { return product_kernels().sum_bytes; }
bool multiplies_pairs() { return product_kernels().pairs; }

}  // namespace fused_kd
