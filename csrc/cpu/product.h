// C (M, N) = or += A (M, K) · B (K, N), from any mixture of element types and layouts.
//
// Operands are converted while they are packed into blocks, so neither is ever copied whole. An
// element of C is summed in float32 over K in blocks whose length depends on the instruction set
// alone: it has the same bits for any M, N, position in C and number of threads. A 16-bit C is
// rounded once, from the whole sum; with AVX512_BF16 or AMX, subnormal bfloat16 numbers become 0.
// Torch-free.
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
  // The type that B's values, and A's if `round_a`, are rounded to before the multiplication; f32:
  // no rounding. An instruction set that multiplies bfloat16 pairs (`multiplies_pairs`) rounds A in
  // any case if it is bf16.
  Dtype round_to;
  bool round_a;
  const float* bias;  // (N), added once; null: none
  bool accumulate;    // add to the values in C; float32 and without a bias
  void* c;
  Dtype c_dtype;
  int64_t c_stride;  // of rows; columns have stride 1
};

void multiply(const Product&, const Parallel&);
// Returns true if both have the same product of two matrices of small integers, which is exact.
bool agree(const ProductKernels&, const ProductKernels&);
// Bytes that each thread allocates during a product; and at most in addition, for the sums of a
// 16-bit C, unless they are fewer than C has elements.
int64_t product_bytes();
int64_t product_sum_bytes();
bool multiplies_pairs();

// Rows and columns of C that one thread computes.
struct Region {
  int64_t row, rows, column, columns;
};

// Rows of C, or of the values that its sums start from.
template <class T>
struct Place {
  T* data;  // null: zeros
  int64_t stride;
};

// The product of an instruction set.
struct ProductKernels {
  int64_t rows, columns;  // of a tile; regions begin at multiples of them
  bool pairs;             // whether both operands are rounded where `round_to` is bf16
  int64_t bytes;          // of the packed blocks
  int64_t sum_bytes;      // of the most sums of a 16-bit C
  // Returns the bytes of memory that the region's product needs.
  int64_t (*needs)(const Product&, const Region&);
  void (*multiply)(const Product&, const Region&, float* memory);  // aligned to a cache line
};

}  // namespace fused_kd
