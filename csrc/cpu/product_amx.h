// Products of bfloat16 panels in the tile registers of AMX (Intel, from Sapphire Rapids on).
//
// A tile register holds 16 rows of 64 bytes. One instruction adds to 16 x 16 sums the product of
// 16 rows of A, 16 steps each, and 16 steps of B, 16 columns each; a step is a pair of bfloat16.
// Four registers are the sums of 32 x 32 elements of C, two hold A, two B.
#pragma once

#include "product.h"
#include "product_pack.h"

namespace fused_kd {
namespace FUSED_KD_ISA {

constexpr int TILE = 16;                             // rows, columns and steps of a register
constexpr int TILE_SIZE = TILE * TILE;               // 32-bit elements
constexpr int TILE_ROW = TILE * int(sizeof(float));  // bytes

// The tile registers of this thread, all 16 x 16, for the lifetime of the object.
class TileRegisters {
 public:
  TileRegisters() {
    // ldtilecfg's operand: palette, first row, 14 reserved bytes; bytes of a row; numbers of rows
    struct alignas(64) Configuration {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
#define FUSED_KD_EIGHT(x) \
  { x, x, x, x, x, x, x, x }
    // static, because GCC's intrinsic tells the compiler of its first 8 bytes alone
    static const Configuration all = {1, 0, {}, FUSED_KD_EIGHT(TILE_ROW), FUSED_KD_EIGHT(TILE)};
#undef FUSED_KD_EIGHT
    _tile_loadconfig(&all);
  }
  ~TileRegisters() { _tile_release(); }  // the system need not save them any longer
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Packs 16 steps of 16 columns: to[step * 16 + column]; zeros behind the last step.
template <class Step>
FUSED_KD_INLINE void pack_tile_of_b(const Source& b, float* to) {
  if (b.depth < TILE * Step::DEPTH) memset(to, 0, TILE_SIZE * sizeof(float));
  pack_for<Step, TILE>(b)(b, to);
}

// Packs 16 rows of 16 steps: to[row * 16 + step].
template <class Step>
FUSED_KD_INLINE void pack_tile_of_a(const Source& a, float* to) {
  if (a.width_stride == 1) {
    float columns[TILE_SIZE];
    pack_tile_of_b<Step>(a, columns);
    pack_along<Singles<float, Dtype::f32>, TILE>({columns, TILE, 1, TILE, TILE, TILE}, to);
    return;
  }
  const auto* row = static_cast<const typename Step::Element*>(a.data);
  for (int64_t i = 0; i < TILE; ++i, row += a.width_stride, to += TILE) {
    const Words x = i < a.there ? Step::along(row, a.depth) : Words{};
    memcpy(to, &x, sizeof x);
  }
}

// Packs a block in panels of two tiles: the two of one depth follow each other.
template <class T, bool OF_A>
inline void pack_tiles(const Source& x, float* to) {
  constexpr int64_t WIDTH = 2 * TILE, DEPTH = TILE * Pairs<T>::DEPTH;
  const auto* data = static_cast<const T*>(x.data);
  const int64_t panel = (x.depth + DEPTH - 1) / DEPTH * 2 * TILE_SIZE;
  const auto pack_both = [&](int64_t i, int64_t k) {
    float* target = to + i / WIDTH * panel + k / DEPTH * 2 * TILE_SIZE;
    const int64_t depth = x.depth - k < DEPTH ? x.depth - k : DEPTH;
    // a second tile that does not exist is not multiplied
    for (int64_t n = i; n < i + WIDTH && n < x.width; n += TILE, target += TILE_SIZE) {
      const Source tile{data + n * x.width_stride + k * x.depth_stride,
                        x.width_stride,
                        x.depth_stride,
                        TILE,
                        x.there - n,
                        depth};
      OF_A ? pack_tile_of_a<Pairs<T>>(tile, target) : pack_tile_of_b<Pairs<T>>(tile, target);
    }
  };
  // The loops follow the lines of the memory; the hardware prefetcher does not follow that many.
  constexpr int64_t AHEAD = 64, CACHE_LINE = 64 / int64_t(sizeof(T));
  const bool across = x.width_stride == 1;
  const int64_t lines = across ? x.depth : x.width,
                stride = across ? x.depth_stride : x.width_stride;
  const int64_t length = across ? x.width : x.depth;
  static_assert(WIDTH == DEPTH, "a step in either direction");
  for (int64_t line = 0; line < lines; line += WIDTH)
    for (int64_t at = 0; at < length; at += WIDTH) {
      for (int64_t i = line; i < line + WIDTH && i < lines; ++i)
        for (int64_t j = 0; j < WIDTH; j += CACHE_LINE)
          __builtin_prefetch(data + i * stride + at + AHEAD + j);
      across ? pack_both(at, line) : pack_both(line, at);
    }
}

template <bool OF_A>
inline void pack_tiles(const Source& x, Dtype from, float* to) {
  switch (from) {
    case Dtype::f32: return pack_tiles<float, OF_A>(x, to);
    case Dtype::bf16: return pack_tiles<Bf16, OF_A>(x, to);
    case Dtype::f16: return pack_tiles<Half, OF_A>(x, to);
  }
}

// The interface that product_kernels.h needs; as Vectors (product_vectors.h).
struct AmxTiles {
  static constexpr int ROWS = 2 * TILE, COLUMNS = 2 * TILE, DEPTH = 2;

  static constexpr int64_t tiles(int64_t steps) { return (steps + TILE - 1) / TILE; }
  static constexpr int64_t size_of_a(int64_t steps) { return 2 * TILE_SIZE * tiles(steps); }
  static constexpr int64_t size_of_b(int64_t steps) { return size_of_a(steps); }

  static void pack_a(const Source& a, Dtype from, Dtype, float* to) {
    pack_tiles<true>(a, from, to);
  }
  static void pack_b(const Source& b, Dtype from, Dtype, float* to) {
    pack_tiles<false>(b, from, to);
  }

  // Computes `rows` x `columns` of to = from + a panel of A times a panel of B.
  template <class T>
  static void multiply(int64_t steps, const float* a, const float* b, Place<const float> from,
                       Place<T> to, int64_t rows, int64_t columns) {
    alignas(64) float sums[ROWS * COLUMNS];
    if (rows > TILE)
      columns > TILE ? sum<2, 2>(steps, a, b, sums) : sum<2, 1>(steps, a, b, sums);
    else
      columns > TILE ? sum<1, 2>(steps, a, b, sums) : sum<1, 1>(steps, a, b, sums);
    for (int64_t i = 0; i < rows && i < ROWS; ++i)
      for (int64_t j = 0; j < columns && j < COLUMNS; j += LANES)
        finish(loaded<Floats>(sums + i * COLUMNS + j),
               from.data ? from.data + i * from.stride + j : nullptr, to.data + i * to.stride + j,
               columns - j);
  }

 private:
  // Computes R x S tiles of sums.
  template <int R, int S>
  static FUSED_KD_INLINE void sum(int64_t steps, const float* a, const float* b, float* sums) {
    // GCC's intrinsics do not tell the compiler that they read memory; those that store do
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
    _tile_zero(0);
    if constexpr (S > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && S > 1) _tile_zero(3);
    for (int64_t t = tiles(steps); t > 0; --t, a += 2 * TILE_SIZE, b += 2 * TILE_SIZE) {
      _tile_loadd(4, a, TILE_ROW);
      _tile_loadd(6, b, TILE_ROW);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (S > 1) {
        _tile_loadd(7, b + TILE_SIZE, TILE_ROW);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        _tile_loadd(5, a + TILE_SIZE, TILE_ROW);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (R > 1 && S > 1) _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int ROW_BYTES = COLUMNS * int(sizeof(float));
    _tile_stored(0, sums, ROW_BYTES);
    if constexpr (S > 1) _tile_stored(1, sums + TILE, ROW_BYTES);
    if constexpr (R > 1) _tile_stored(2, sums + TILE * COLUMNS, ROW_BYTES);
    if constexpr (R > 1 && S > 1) _tile_stored(3, sums + TILE * COLUMNS + TILE, ROW_BYTES);
  }

  // Stores a vector of which `count` elements exist.
  template <class T>
  static FUSED_KD_INLINE void finish(Floats sum, const float* from, T* to, int64_t count) {
    float start[LANES];
    if (from) sum = loaded<Floats>(complete<LANES>(from, count, start)) + sum;
    if (count >= LANES) return store(to, sum);
    T last[LANES];
    store(last, sum);
    memcpy(to, last, count * sizeof(T));
  }
};

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd
