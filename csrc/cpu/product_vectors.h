// Products of panels in vector registers: tiles of C of 12 x 32, or fewer with shorter vectors.
//
// A tile stays in registers over the depth of a block; each step costs COLUMNS / LANES loads of B's
// panel and ROWS broadcasts of A's. The accumulators, the vectors of B's step and one broadcast fill
// the registers.
#pragma once

#include "product.h"
#include "product_pack.h"

namespace fused_kd {
namespace FUSED_KD_ISA {

// Steps of one float32.
struct MultiplySingles {
  static constexpr int DEPTH = 1;
  static FUSED_KD_INLINE Floats add(Floats sum, const float* a, Floats b) {
    return fma(splat(*a), b, sum);
  }
  template <int W>
  static void pack(const Source& x, Dtype from, Dtype round, float* to) {
    pack_singles<W>(x, from, round, to);
  }
};

#ifdef __AVX512BF16__
// Steps of two bfloat16.
struct MultiplyPairs {
  static constexpr int DEPTH = 2;
  static FUSED_KD_INLINE Floats add(Floats sum, const float* a, Floats b) {
    const Words pair = Words{} + loaded<uint32_t>(a);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)b);
  }
  template <int W>
  static void pack(const Source& x, Dtype from, Dtype, float* to) {
    pack_pairs<W>(x, from, to);
  }
};
#endif

// The interface that product_kernels.h needs; AmxTiles (product_amx.h) is the other one.
template <class Step>
struct Vectors {
#if FUSED_KD_LANES == 16
  static constexpr int ROWS = 12, COLUMNS = 32;
#elif FUSED_KD_LANES == 8
  static constexpr int ROWS = 6, COLUMNS = 16;
#elif defined(__aarch64__)
  static constexpr int ROWS = 8, COLUMNS = 8;
#else
  static constexpr int ROWS = 4, COLUMNS = 8;
#endif
  static constexpr int DEPTH = Step::DEPTH, VECTORS = COLUMNS / LANES;

  static constexpr int64_t size_of_a(int64_t steps) { return panel_size(ROWS, steps); }
  static constexpr int64_t size_of_b(int64_t steps) { return panel_size(COLUMNS, steps); }

  static void pack_a(const Source& a, Dtype from, Dtype round, float* to) {
    Step::template pack<ROWS>(a, from, round, to);
  }
  static void pack_b(const Source& b, Dtype from, Dtype round, float* to) {
    Step::template pack<COLUMNS>(b, from, round, to);
  }

  // Computes `rows` x `columns` of to = from + a panel of A times a panel of B.
  template <class T>
  static FUSED_KD_INLINE void multiply(int64_t steps, const float* a, const float* b,
                                       Place<const float> from, Place<T> to, int64_t rows,
                                       int64_t columns) {
    if (rows >= ROWS && columns >= COLUMNS)
      tile<ROWS>(steps, a, b, from, to);
    else
      edge(steps, a, b, from, to, rows < ROWS ? rows : ROWS, columns < COLUMNS ? columns : COLUMNS);
  }

 private:
  // The first R rows.
  template <int R, class T>
  static FUSED_KD_INLINE void tile(int64_t steps, const float* a, const float* b,
                                   Place<const float> from, Place<T> to) {
    Floats sum[R][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = Floats{};
    for (int64_t step = 0; step < steps; ++step, a += ROWS, b += COLUMNS) {
      Floats right[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) right[v] = loaded<Floats>(b + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = Step::add(sum[i][v], a + i, right[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        Floats x = sum[i][v];
        if (from.data) x = loaded<Floats>(from.data + i * from.stride + v * LANES) + x;
        store(to.data + i * to.stride + v * LANES, x);
      }
  }

  // A tile at an edge of C. Half a tile takes half the time; fewer rows would leave the multipliers
  // waiting for each other.
  template <class T>
  static void edge(int64_t steps, const float* a, const float* b, Place<const float> from,
                   Place<T> to, int64_t rows, int64_t columns) {
    float start[ROWS * COLUMNS] = {};
    T finish[ROWS * COLUMNS];
    if (from.data) {
      for (int64_t i = 0; i < rows; ++i)
        memcpy(start + i * COLUMNS, from.data + i * from.stride, columns * sizeof(float));
      from = {start, COLUMNS};
    }
    const Place<T> whole{finish, COLUMNS};
    if (rows > ROWS / 2)
      tile<ROWS>(steps, a, b, from, whole);
    else
      tile<ROWS / 2>(steps, a, b, from, whole);
    for (int64_t i = 0; i < rows; ++i)
      memcpy(to.data + i * to.stride, finish + i * COLUMNS, columns * sizeof(T));
  }
};

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd
