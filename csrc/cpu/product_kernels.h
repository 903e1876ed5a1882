// The product of a region of C for the instruction set that this translation unit is compiled for.
//
// Blocks of both operands are packed in panels, and tiles of C are multiplied from one panel of each
// (product_vectors.h, product_amx.h). A block's sum starts at zero and is then added to the value in
// C, so that the order of an element's sum depends on K alone.
#pragma once

#include "product.h"
#include "product_vectors.h"
#ifdef __AMX_BF16__
#include "product_amx.h"
#endif

namespace fused_kd {
namespace FUSED_KD_ISA {

// How operands are multiplied that are not rounded to bfloat16, and those that are.
using SingleKernel = Vectors<MultiplySingles>;
#if defined(__AMX_BF16__)
using PairKernel = AmxTiles;
#elif defined(__AVX512BF16__)
using PairKernel = Vectors<MultiplyPairs>;
#else
using PairKernel = SingleKernel;
#endif
constexpr int ROWS = PairKernel::ROWS, COLUMNS = PairKernel::COLUMNS;
static_assert(COLUMNS == SingleKernel::COLUMNS, "blocks of both have the same width");

// Three sizes stay in three caches: a panel of B (STEPS x COLUMNS) in L1 while all of A's block is
// multiplied by it; A's block (LARGE x STEPS) in L2 while B is packed and multiplied, SMALL columns
// at a time; the part of C (LARGE x at most WIDE) in L3 between two blocks of K. The sums of a
// 16-bit C are a part of their own, of half the width to save memory.
constexpr int64_t STEPS = 256, SMALL = 3 * COLUMNS, WIDE = 1152 / SMALL * SMALL;
#ifdef __AMX_BF16__
// Packing B is a larger part of the time, and processors with AMX have L2 caches of 2 MiB. Their L1
// holds a panel of B, but not one of A next to it.
constexpr int64_t LARGE = 768, MOST_BYTES = 1 << 20, MOST_SUM_BYTES = 1 << 21;
#else
constexpr int64_t LARGE = 288, MOST_BYTES = 1 << 19, MOST_SUM_BYTES = 1 << 20;
#endif
constexpr int64_t SUMS_WIDE = WIDE / 2 / SMALL * SMALL;
static_assert(LARGE % ROWS == 0 && LARGE % SingleKernel::ROWS == 0, "a block is whole panels");

constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t A_SIZE = most(LARGE / SingleKernel::ROWS * SingleKernel::size_of_a(STEPS),
                                LARGE / ROWS * PairKernel::size_of_a(STEPS));
constexpr int64_t B_SIZE =
    SMALL / COLUMNS * most(SingleKernel::size_of_b(STEPS), PairKernel::size_of_b(STEPS));
constexpr int64_t BYTES = (A_SIZE + B_SIZE) * int64_t(sizeof(float));
constexpr int64_t SUM_BYTES = LARGE * SUMS_WIDE * int64_t(sizeof(float));
static_assert(BYTES <= MOST_BYTES && SUM_BYTES <= MOST_SUM_BYTES, "promised");
static_assert(A_SIZE % 16 == 0, "B's block begins at a cache line");

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t LINE = 64;  // bytes of a cache line

// Prefetches the memory that the next block of an operand is packed from, a few cache lines at a
// time while the present block is multiplied.
class Ahead {
 public:
  Ahead(const Source& b, int element, int64_t tiles) {
    const bool across = b.width_stride == 1;
    const int64_t width = least(b.width, b.there);
    next_ = static_cast<const char*>(b.data);
    stride_ = (across ? b.depth_stride : b.width_stride) * element;
    left_ = across ? b.depth : width;
    bytes_ = (across ? width : b.depth) * element;
    if (b.data) each_ = left_ * (bytes_ / LINE + 1) / tiles + 1;
  }
  FUSED_KD_INLINE void fetch() {
    for (int64_t i = 0; i < each_ && left_ > 0; ++i) {
      __builtin_prefetch(next_ + at_, 0, 2);
      at_ += LINE;
      if (at_ < bytes_ + LINE) continue;
      at_ = 0;
      next_ += stride_;
      --left_;
    }
  }

 private:
  const char* next_;
  int64_t stride_, left_, bytes_, at_ = 0, each_ = 0;
};

// Prefetches a tile of C while its sums are computed.
template <class Kernel, class T>
FUSED_KD_INLINE void fetch_tile(Place<T> c, int64_t rows) {
#pragma GCC unroll 32
  for (int i = 0; i < Kernel::ROWS; ++i)
    for (int at = 0; at < COLUMNS; at += LINE / int(sizeof(T)))
      if (i < rows) __builtin_prefetch(c.data + i * c.stride + at);
}

// Multiplies all tiles of a block of C; B's panel stays in L1 while A's panels change. `cold`: what
// the sums are added to is in no cache.
template <class Kernel, class T>
inline void multiply_block(int64_t steps, const float* a, const float* b, Place<const float> from,
                           Place<T> to, int64_t rows, int64_t columns, bool cold, Ahead& ahead) {
  for (int64_t n = 0; n < columns; n += COLUMNS, b += Kernel::size_of_b(steps)) {
    const float* panel = a;
    for (int64_t m = 0; m < rows; m += Kernel::ROWS, panel += Kernel::size_of_a(steps)) {
      const Place<const float> start{from.data ? from.data + m * from.stride + n : nullptr,
                                     from.stride};
      const Place<T> target{to.data + m * to.stride + n, to.stride};
      ahead.fetch();
      if (cold) fetch_tile<Kernel>(target, rows - m);
      Kernel::multiply(steps, panel, b, start, target, rows - m, columns - n);
    }
  }
}

template <class Kernel>
struct RegionProduct {
  const Product& p;
  float *a, *b, *sums;  // sums: only of a 16-bit C whose K has several blocks
  int64_t sums_stride;

  static constexpr int64_t DEPTH = STEPS * Kernel::DEPTH;

  int64_t depth(int64_t k) const { return least(p.K - k, DEPTH); }
  bool is_last(int64_t k) const { return k + DEPTH >= p.K; }
  bool keeps_sums() const { return p.c_dtype != Dtype::f32 && p.K > DEPTH; }

  static const void* at(const Operand& x, int64_t row, int64_t column) {
    const int64_t offset = row * x.row_stride + column * x.column_stride;
    return static_cast<const char*>(x.data) + offset * width(x.dtype);
  }
  Source rows_of_a(int64_t m, int64_t rows, int64_t k) const {
    return {at(p.a, m, k), p.a.row_stride, p.a.column_stride, rows, p.M - m, depth(k)};
  }
  Source columns_of_b(int64_t n, int64_t columns, int64_t k) const {
    return {at(p.b, k, n), p.b.column_stride, p.b.row_stride, columns, p.N - n, depth(k)};
  }

  // Computes or adds to a block of C, of which the blocks of K before k are in `sums`.
  void add_block(int64_t m, int64_t rows, int64_t n, int64_t columns, int64_t k, float* sums,
                 const Source& next) const {
    switch (p.c_dtype) {
      case Dtype::f32: return add_block_in<float>(m, rows, n, columns, k, nullptr, next);
      case Dtype::bf16: return add_block_in<Bf16>(m, rows, n, columns, k, sums, next);
      case Dtype::f16: return add_block_in<Half>(m, rows, n, columns, k, sums, next);
    }
  }

  template <class T>
  void add_block_in(int64_t m, int64_t rows, int64_t n, int64_t columns, int64_t k, float* sums,
                    const Source& next) const {
    const Place<T> c{static_cast<T*>(p.c) + m * p.c_stride + n, p.c_stride};
    Place<float> sum{sums, sums_stride};
    if constexpr (std::is_same_v<T, float>) sum = c;
    Place<const float> from{sum.data, sum.stride};
    if (k == 0 && !p.accumulate) from = {p.bias ? p.bias + n : nullptr, 0};
    const bool cold = k == 0 && p.accumulate;
    const int64_t steps = divided(depth(k), Kernel::DEPTH);
    Ahead ahead(next, width(p.b.dtype), divided(rows, Kernel::ROWS) * divided(columns, COLUMNS));
    if (is_last(k))
      multiply_block<Kernel>(steps, a, b, from, c, rows, columns, cold, ahead);
    else
      multiply_block<Kernel>(steps, a, b, from, sum, rows, columns, false, ahead);
  }

  // Computes these rows of C, which stay in a cache between two blocks of K.
  void add_rows(int64_t m, int64_t rows, int64_t begin, int64_t end) const {
    for (int64_t k = 0; k == 0 || k < p.K; k += DEPTH) {
      Kernel::pack_a(rows_of_a(m, rows, k), p.a.dtype, p.round_a ? p.round_to : Dtype::f32, a);
      for (int64_t n = begin; n < end; n += SMALL) {
        const int64_t columns = least(SMALL, end - n);
        Kernel::pack_b(columns_of_b(n, columns, k), p.b.dtype, p.round_to, b);
        Source next{};
        if (n + SMALL < end)
          next = columns_of_b(n + SMALL, least(SMALL, end - n - SMALL), k);
        else if (!is_last(k))
          next = columns_of_b(begin, least(SMALL, end - begin), k + DEPTH);
        add_block(m, rows, n, columns, k, sums + (n - begin), next);
      }
    }
  }
  void run(const Region& r) const {
    const int64_t end_m = r.row + r.rows, end_n = r.column + r.columns;
    // A is packed again for each part of the columns, so there are few parts, of even width
    const int64_t parts = divided(r.columns, keeps_sums() ? SUMS_WIDE : WIDE);
    const int64_t part = divided(divided(r.columns, parts), SMALL) * SMALL;
    for (int64_t n = r.column; n < end_n; n += part)
      for (int64_t m = r.row; m < end_m; m += LARGE)
        add_rows(m, least(LARGE, end_m - m), n, least(n + part, end_n));
  }
};

inline int64_t sums_stride(const Region& region) {
  return least(SUMS_WIDE, divided(region.columns, COLUMNS) * COLUMNS);
}

inline int64_t needed_bytes(const Product& p, const Region& region) {
  const int depth = p.round_to == Dtype::bf16 ? PairKernel::DEPTH : SingleKernel::DEPTH;
  if (p.c_dtype == Dtype::f32 || p.K <= STEPS * depth) return BYTES;
  return BYTES + least(LARGE, region.rows) * sums_stride(region) * int64_t(sizeof(float));
}

inline void multiply_region(const Product& p, const Region& region, float* memory) {
  float *const b = memory + A_SIZE, *const sums = b + B_SIZE;
  const int64_t stride = sums_stride(region);
  if (p.round_to != Dtype::bf16)
    return RegionProduct<SingleKernel>{p, memory, b, sums, stride}.run(region);
#ifdef __AMX_BF16__
  const TileRegisters registers;
#endif
  RegionProduct<PairKernel>{p, memory, b, sums, stride}.run(region);
}

constexpr bool PAIRS = PairKernel::DEPTH == 2;

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd

#define FUSED_KD_DEFINE_PRODUCT(table)                                                    \
  namespace fused_kd {                                                                    \
  extern const ProductKernels table;                                                      \
  const ProductKernels table = {FUSED_KD_ISA::ROWS,           FUSED_KD_ISA::COLUMNS,      \
                                FUSED_KD_ISA::PAIRS,          FUSED_KD_ISA::BYTES,        \
                                FUSED_KD_ISA::SUM_BYTES,      FUSED_KD_ISA::needed_bytes, \
                                FUSED_KD_ISA::multiply_region};                           \
  }
