// The table of block kernels that each instruction set fills in, and its arguments.
//
// A block is at most BLOCK consecutive entries of one row, a whole number of vector pairs, with
// student and teacher in the same element type. The driver handles what is per row: maxima,
// normalisers, labels, infinities.
#pragma once

#include <stdint.h>

#include <atomic>

#include "../kd_math.h"
#include "../problem.h"

namespace fused_kd {

// 2048 entries of two rows are 8 KiB (bfloat16) or 16 KiB (float): in the L1 cache between the
// passes over one block.
constexpr int BLOCK = 2048;
constexpr int MAX_PAIR = 32;  // elements in the largest vector pair; BLOCK is a multiple

// How a block's elements are stored, and whether exponentials must handle arguments that underflow.
enum class Load : int { f32 = 0, bf16 = 1, f32_any = 2, f16 = 3 };
inline Dtype dtype_of(Load load) {
  return load == Load::bf16 ? Dtype::bf16 : load == Load::f16 ? Dtype::f16 : Dtype::f32;
}

// How the hard term's e^(s - m_s) is computed: not at all, as a power of P (T = 1, 2, 4), or by a
// separate exponential.
enum class Hard : int { off = 0, power1 = 1, power2 = 2, power4 = 3, separate = 4 };

struct Range {
  float max_s, min_s, sum_s;  // the sum is only a check: if it is finite, every entry is
  float max_t, min_t, sum_t;
};

struct Block {
  const void* s;
  const void* t;
  int size;        // elements, a multiple of MAX_PAIR
  float m_s, m_t;  // the references that exponents are relative to
  float k, k_1;    // log2(e)/T and log2(e)
  // The next row's block, which `gradient` prefetches; null: prefetch nothing.
  const void* next_s = nullptr;
  const void* next_t = nullptr;
};

struct BlockSums {
  float d_s, d_t, d_1, w;
  float max_a, min_a, max_b, min_b;  // of the logits relative to their references
  float canary;                      // finite if and only if every entry is and w did not overflow
};

// Sums over the entries of a block for `measure`: of P = e^((s - m_s)/T), E = e^(s - m_s), Q and G, the
// same of the teacher, and D = P - ratio Q. At T = 1 G, Ea and Gb are 0: they are Q, Pa and Qb.
struct BlockMeasures {
  float E, EE, D, DD, ED, G;
  float Pa, Ea, Qb, Gb;  // a, b: the logits relative to their references
  float max_s, max_t;    // the largest logits
};

struct Kernels {
  const char* name;
  float exponent_range;  // largest |exponent|, in powers of two, that all but Load::f32_any take
  bool reads_f16;        // the kernels take Load::f16
  void (*range)(Load, const void* s, const void* t, int size, Range*);
  void (*sums)(Load, Divergence, Hard, const Block&, BlockSums*);
  void (*sums2)(Load, Divergence, const Block&, const Constants<float>&, float* x, float* y);
  // Adds `hard_scale * e^(s - m_s) + hard_offset` to the divergence's gradient; grad is in the
  // block's element type, may be s itself.
  void (*gradient)(Load, Divergence, Hard, const Block&, const Constants<float>&, float hard_scale,
                   float hard_offset, void* grad);
  // `Hard` says how E and G follow from P and Q.
  void (*measure)(Load, Hard, const Block&, float ratio, BlockMeasures*);
  float (*largest)(Load, const void* s, int size);
  float (*differences)(const float* s, int size,
                       float m);  // sum of s - m over any number of elements
  void (*widen)(Dtype, const void* from, float* to, int size);
  void (*narrow)(Dtype, const float* from, void* to, int size);
  void (*scale)(Dtype, void* values, int64_t size, float factor);
};

struct ProductKernels;  // product.h

// The best tables for this processor, or those that FUSED_KD_CPU names. Throws std::runtime_error
// if the processor cannot run them.
const Kernels& kernels();
const ProductKernels& product_kernels();
const char* instruction_set();  // whose tables these are
// A compiled instruction set, and whether this processor can run it.
struct Candidate {
  const char* name;
  const Kernels* rows;
  const ProductKernels* product;
  std::atomic<bool> runs;
  // To be called before it is used; false: it cannot be used after all. Null: nothing to prepare.
  bool (*prepare)() = nullptr;
};
Candidate* candidates(int* count);
// Selects an instruction set for the rest of the process (for tests); "": by the environment again.
void choose_kernels(const char* name);

}  // namespace fused_kd
