// C (M, N) float32 = or += A (M, K) · B (K, N), from any mixture of element types and layouts.
//
// Operands are converted while they are packed into blocks, so neither is ever copied whole. An
// element of C is the sum over K in blocks whose length is the instruction set's: the same bits for
// any M, N, position in C and number of threads. Torch-free.
#pragma once

#include <stdint.h>

#include "../problem.h"
#include "kernels.h"
#include "parallel.h"

namespace fused_kd {

// One of the strides is 1; both count elements.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;
};

struct Product {
  int64_t M, N, K;
  Operand a, b;
  // The type that B's values are rounded to before they are multiplied, and A's too if `round_a`;
  // f32: no rounding. With bf16, an instruction set that multiplies bfloat16 pairs rounds A always.
  Dtype round_to;
  bool round_a;
  const float* bias;  // (N), added once; null: none
  bool accumulate;    // onto the values in C; no bias then
  float* c;
  int64_t c_stride;  // of rows; columns have stride 1
};

void multiply(const Product&, const Parallel&);
// Memory that each thread allocates for the time of a product.
int64_t product_bytes();

// Rows and columns of C that one thread computes.
struct Region {
  int64_t row, rows, column, columns;
};

// The product of an instruction set.
struct ProductKernels {
  int64_t rows, columns;  // of a tile: regions begin at multiples
  int64_t bytes;          // of the packed blocks
  void (*multiply)(const Product&, const Region&, float* memory);  // at a cache line
};

}  // namespace fused_kd
