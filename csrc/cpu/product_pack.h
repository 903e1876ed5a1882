// Packing: a block of an operand, converted to the 32-bit steps that the product of this
// instruction set multiplies, in panels as wide as its tile.
//
// Along the operand's width (rows of A, columns of B) a panel holds W values; the steps of the
// depth K follow each other: panel[step * W + i]. A step is one float32, or two bfloat16 if the
// processor multiplies such pairs. The last panel and the last step are filled with zeros.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "vec.h"

namespace fused_kd {
namespace FUSED_KD_ISA {

// Unused space after every panel: stores of whole vectors run over its end, and panels at a
// distance of a power of two would compete for the same cache sets.
constexpr int PANEL_GAP = 16;
static_assert(PANEL_GAP >= LANES, "a vector that begins in a panel ends in its gap");

typedef uint16_t HalfWords __attribute__((vector_size(2 * FUSED_KD_LANES)));

template <class T>
FUSED_KD_INLINE T loaded(const void* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

// ------------------------------------------------------------------------------- conversions

FUSED_KD_INLINE Floats widened(const float* p) { return loaded<Floats>(p); }
FUSED_KD_INLINE Floats widened(const Bf16* p) {
  return floats(__builtin_convertvector(loaded<HalfWords>(p), Words) << 16);
}
FUSED_KD_INLINE Floats widened(const Half* p) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(loaded<__m256i>(p));
#elif FUSED_KD_LANES == 8 && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(loaded<__m128i>(p));
#else
  Floats x{};
  for (int i = 0; i < LANES; ++i) x[i] = half_to_float(p[i]);
  return x;
#endif
}

template <Dtype TO>
FUSED_KD_INLINE Floats rounded(Floats x) {
  if constexpr (TO == Dtype::bf16) {
    const Words nearest = round_to_bf16(x) & 0xffff0000u;
    return select(x == x, floats(nearest), floats(Words{} + 0x7fc00000u));
  } else if constexpr (TO == Dtype::f16) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif FUSED_KD_LANES == 8 && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; ++i) x[i] = half_to_float(float_to_half(x[i]));
    return x;
#endif
  } else {
    return x;
  }
}

// Stores values, rounded to the element type.
FUSED_KD_INLINE void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }
FUSED_KD_INLINE void store(Bf16* p, Floats x) {
#ifdef __AVX512BF16__
  const auto raw = _mm512_cvtneps_pbh((__m512)x);
#else
  const HalfWords raw = __builtin_convertvector(bits(rounded<Dtype::bf16>(x)) >> 16, HalfWords);
#endif
  memcpy(p, &raw, sizeof raw);
}
FUSED_KD_INLINE void store(Half* p, Floats x) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  const auto raw = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif FUSED_KD_LANES == 8 && defined(__F16C__)
  const auto raw = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfWords raw{};
  for (int i = 0; i < LANES; ++i) raw[i] = float_to_half(x[i]).raw;
#endif
  memcpy(p, &raw, sizeof raw);
}

// Returns an address at which SIZE elements can be read: p, or if only `count` exist, a copy that
// is filled with zeros.
template <int SIZE, class T>
FUSED_KD_INLINE const T* complete(const T* p, int64_t count, T* copy) {
  if (count >= SIZE) return p;
  memset(copy, 0, SIZE * sizeof(T));
  if (count > 0) memcpy(copy, p, count * sizeof(T));
  return copy;
}

// ------------------------------------------------------------------------------------- steps

// One float32 per step.
template <class T, Dtype ROUND>
struct Singles {
  using Element = T;
  static constexpr int DEPTH = 1;

  // LANES consecutive steps of one row, of which the first `count` elements exist.
  static FUSED_KD_INLINE Words along(const T* p, int64_t count) {
    T copy[LANES];
    return bits(rounded<ROUND>(widened(complete<LANES>(p, count, copy))));
  }
  // The same step of LANES neighbouring rows, of which `count` exist.
  static FUSED_KD_INLINE Words across(const T* p, int64_t, int64_t, int64_t count) {
    return along(p, count);
  }
};

#ifdef __AVX512BF16__
// The 16 bits in the lower half of the vector, each followed by its counterpart in the upper half.
FUSED_KD_INLINE Words interleaved(Words halves) {
  typedef uint16_t Parts __attribute__((vector_size(sizeof(Words))));
#define FUSED_KD_PAIR(i) i, i + LANES
#define FUSED_KD_PAIRS                                                                          \
  FUSED_KD_PAIR(0), FUSED_KD_PAIR(1), FUSED_KD_PAIR(2), FUSED_KD_PAIR(3), FUSED_KD_PAIR(4),     \
      FUSED_KD_PAIR(5), FUSED_KD_PAIR(6), FUSED_KD_PAIR(7), FUSED_KD_PAIR(8), FUSED_KD_PAIR(9), \
      FUSED_KD_PAIR(10), FUSED_KD_PAIR(11), FUSED_KD_PAIR(12), FUSED_KD_PAIR(13),               \
      FUSED_KD_PAIR(14), FUSED_KD_PAIR(15)
#ifdef __clang__
  return (Words)__builtin_shufflevector((Parts)halves, (Parts)halves, FUSED_KD_PAIRS);
#else
  return (Words)__builtin_shuffle((Parts)halves, Parts{FUSED_KD_PAIRS});
#endif
}

// Two bfloat16 per step, the first in the lower half.
template <class T>
struct Pairs {
  using Element = T;
  static constexpr int DEPTH = 2;

  static FUSED_KD_INLINE Words along(const T* p, int64_t count) {
    T copy[2 * LANES];
    const T* q = complete<2 * LANES>(p, count, copy);
    if constexpr (std::is_same_v<T, Bf16>) return loaded<Words>(q);
    return (Words)_mm512_cvtne2ps_pbh((__m512)widened(q + LANES), (__m512)widened(q));
  }
  // The second element of a pair is `stride` away; it exists if `depth` is 2 or more.
  static FUSED_KD_INLINE Words across(const T* p, int64_t stride, int64_t depth, int64_t count) {
    T copy[LANES];
    const T* q = complete<LANES>(p, count, copy);
    if constexpr (std::is_same_v<T, Bf16>) {
      const Words first = __builtin_convertvector(loaded<HalfWords>(q), Words);
      if (depth == 1) return first;
      q = complete<LANES>(p + stride, count, copy);
      return first | __builtin_convertvector(loaded<HalfWords>(q), Words) << 16;
    } else {
      const Floats first = widened(q);
      Floats second{};
      if (depth > 1) second = widened(complete<LANES>(p + stride, count, copy));
      return interleaved((Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
  }
};
#endif

// ----------------------------------------------------------------------------------- panels

// A block of an operand: `width` neighbours and `depth` elements of K; `there` neighbours exist.
struct Source {
  const void* data;
  int64_t width_stride, depth_stride;
  int64_t width, there, depth;
};

constexpr int64_t panel_size(int W, int64_t steps) { return W * steps + PANEL_GAP; }

// Selects, in every 128 bits, the elements A, B, C, D: 0 to 3 of x, 4 to 7 of y.
constexpr int lane_of(int quarter, int element) {
  return 4 * quarter + element % 4 + element / 4 * LANES;
}
#define FUSED_KD_QUARTER(q) lane_of(q, A), lane_of(q, B), lane_of(q, C), lane_of(q, D)
#if FUSED_KD_LANES == 4
#define FUSED_KD_QUARTERS FUSED_KD_QUARTER(0)
#elif FUSED_KD_LANES == 8
#define FUSED_KD_QUARTERS FUSED_KD_QUARTER(0), FUSED_KD_QUARTER(1)
#else
#define FUSED_KD_QUARTERS \
  FUSED_KD_QUARTER(0), FUSED_KD_QUARTER(1), FUSED_KD_QUARTER(2), FUSED_KD_QUARTER(3)
#endif
template <int A, int B, int C, int D>
FUSED_KD_INLINE Floats shuffle(Floats x, Floats y) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, FUSED_KD_QUARTERS);
#else
  return __builtin_shuffle(x, y, Ints{FUSED_KD_QUARTERS});
#endif
}

// Transposes four rows in each 128 bits: row[j] then holds element 4 q + j of the four rows in its
// quarter q.
FUSED_KD_INLINE void transpose(Floats (&row)[4]) {
  const Floats low_01 = shuffle<0, 4, 1, 5>(row[0], row[1]);
  const Floats high_01 = shuffle<2, 6, 3, 7>(row[0], row[1]);
  const Floats low_23 = shuffle<0, 4, 1, 5>(row[2], row[3]);
  const Floats high_23 = shuffle<2, 6, 3, 7>(row[2], row[3]);
  row[0] = shuffle<0, 1, 4, 5>(low_01, low_23);
  row[1] = shuffle<2, 3, 6, 7>(low_01, low_23);
  row[2] = shuffle<0, 1, 4, 5>(high_01, high_23);
  row[3] = shuffle<2, 3, 6, 7>(high_01, high_23);
}

// Packs LANES steps of four neighbours, of which the first `rows` exist; `depth` elements are left.
template <class Step, int W>
FUSED_KD_INLINE void pack_four(const typename Step::Element* p, int64_t stride, int64_t rows,
                               int64_t depth, float* to) {
  Floats row[4];
  for (int j = 0; j < 4; ++j)
    row[j] = j < rows ? floats(Step::along(p + j * stride, depth)) : Floats{};
  transpose(row);
  for (int s = 0; s < LANES; ++s)
    if (s * Step::DEPTH < depth)
      memcpy(to + s * W, reinterpret_cast<const char*>(&row[s % 4]) + s / 4 * 16, 16);
}

// Packs an operand that is contiguous along K.
template <class Step, int W>
inline void pack_along(const Source& b, float* to) {
  constexpr int64_t WHOLE = LANES * Step::DEPTH;
  const auto* data = static_cast<const typename Step::Element*>(b.data);
  const int64_t steps = (b.depth + Step::DEPTH - 1) / Step::DEPTH;
  for (int64_t i = 0; i < b.width; i += W, to += panel_size(W, steps))
  // from the last four: what they store behind their step is the next one's first four
#pragma GCC unroll 8
    for (int first = (W - 1) / 4 * 4; first >= 0; first -= 4) {
      const int64_t n = i + first, wanted = W - first < 4 ? W - first : 4;
      const auto* p = data + n * b.width_stride;
      float* target = to + first;
      int64_t depth = b.depth;
      if (b.there - n >= wanted)
        for (; depth >= WHOLE; depth -= WHOLE, p += WHOLE, target += LANES * W)
          pack_four<Step, W>(p, b.width_stride, wanted, WHOLE, target);
      for (; depth > 0; depth -= WHOLE, p += WHOLE, target += LANES * W)
        pack_four<Step, W>(p, b.width_stride, b.there - n < wanted ? b.there - n : wanted, depth,
                           target);
    }
}

// Packs an operand whose neighbours are contiguous, in whole vectors that overwrite the excess of
// the previous ones.
template <class Step, int W>
inline void pack_across(const Source& b, float* to) {
  const auto* data = static_cast<const typename Step::Element*>(b.data);
  const int64_t steps = (b.depth + Step::DEPTH - 1) / Step::DEPTH;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t done = step * Step::DEPTH;
    float* panel = to + step * W;
    for (int64_t i = 0; i < b.width; i += W, panel += panel_size(W, steps))
      for (int first = 0; first < W; first += LANES) {
        const int64_t n = i + first;
        const Words x = Step::across(data + done * b.depth_stride + n, b.depth_stride,
                                     b.depth - done, b.there - n);
        memcpy(panel + first, &x, sizeof x);
      }
  }
}

using Pack = void (*)(const Source&, float* to);

template <class Step, int W>
inline Pack pack_for(const Source& b) {
  return b.width_stride == 1 ? pack_across<Step, W> : pack_along<Step, W>;
}

// Packs float32 steps: every value is rounded to `round`, unless it has that type.
template <int W>
inline void pack_singles(const Source& b, Dtype from, Dtype round, float* to) {
  using F = Dtype;
  if (from == round) round = F::f32;
  const Pack pack = from == F::f32    ? round == F::f32    ? pack_for<Singles<float, F::f32>, W>(b)
                                        : round == F::bf16 ? pack_for<Singles<float, F::bf16>, W>(b)
                                                           : pack_for<Singles<float, F::f16>, W>(b)
                    : from == F::bf16 ? round == F::f32 ? pack_for<Singles<Bf16, F::f32>, W>(b)
                                                        : pack_for<Singles<Bf16, F::f16>, W>(b)
                    : round == F::f32 ? pack_for<Singles<Half, F::f32>, W>(b)
                                      : pack_for<Singles<Half, F::bf16>, W>(b);
  pack(b, to);
}

#ifdef __AVX512BF16__
template <int W>
inline void pack_pairs(const Source& b, Dtype from, float* to) {
  const Pack pack = from == Dtype::f32    ? pack_for<Pairs<float>, W>(b)
                    : from == Dtype::bf16 ? pack_for<Pairs<Bf16>, W>(b)
                                          : pack_for<Pairs<Half>, W>(b);
  pack(b, to);
}
#endif

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd
