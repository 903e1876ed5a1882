// A vector of LANES floats for the instruction set that this translation unit is compiled for.
//
// Arithmetic uses the vector extension of GCC and Clang, so the same source runs on SSE2, NEON,
// AVX2 and AVX-512. Only what it cannot express (fused multiply-add, maximum, conversions) is an
// intrinsic. Everything is in a namespace named after the instruction set, because the linker must
// never merge an AVX copy of an inline function with a plain one.
//
// A "pair" is 2 * LANES consecutive elements in two vectors. Loads and stores assign elements to
// lanes in the same way; sums do not depend on it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FUSED_KD_ISA
#error "FUSED_KD_ISA names the namespace of this translation unit"
#endif
#ifndef FUSED_KD_LANES
#error "FUSED_KD_LANES is the number of floats in a vector"
#endif

#define FUSED_KD_INLINE inline __attribute__((always_inline))

namespace fused_kd {
namespace FUSED_KD_ISA {

constexpr int LANES = FUSED_KD_LANES;
constexpr int PAIR = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * FUSED_KD_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FUSED_KD_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * FUSED_KD_LANES)));

FUSED_KD_INLINE Floats splat(float x) {
  return x - Floats{};
}  // x - 0 keeps the sign of zero and NaN
FUSED_KD_INLINE Words bits(Floats x) { return reinterpret_cast<Words>(x); }
FUSED_KD_INLINE Floats floats(Words x) { return reinterpret_cast<Floats>(x); }
FUSED_KD_INLINE Floats floats(Ints x) { return reinterpret_cast<Floats>(x); }
FUSED_KD_INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return floats((bits(yes) & reinterpret_cast<Words>(mask)) |
                (bits(no) & ~reinterpret_cast<Words>(mask)));
}

// a*b + c, rounded once if the processor has the instruction. max and min return their second
// argument if one is NaN.
FUSED_KD_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c));
#elif FUSED_KD_LANES == 8 && defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c));
#elif FUSED_KD_LANES == 4 && defined(__aarch64__)
  return reinterpret_cast<Floats>(vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b));
#else
  return a * b + c;
#endif
}
FUSED_KD_INLINE Floats max(Floats a, Floats b) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_max_ps((__m512)a, (__m512)b));
#elif FUSED_KD_LANES == 8 && defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_max_ps((__m256)a, (__m256)b));
#elif FUSED_KD_LANES == 4 && defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_max_ps((__m128)a, (__m128)b));
#else
  return select(a > b, a, b);
#endif
}
FUSED_KD_INLINE Floats min(Floats a, Floats b) {
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_min_ps((__m512)a, (__m512)b));
#elif FUSED_KD_LANES == 8 && defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_min_ps((__m256)a, (__m256)b));
#elif FUSED_KD_LANES == 4 && defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_min_ps((__m128)a, (__m128)b));
#else
  return select(a < b, a, b);
#endif
}

FUSED_KD_INLINE Floats magnitude(Floats x) { return floats(bits(x) & 0x7fffffffu); }
// x with the sign of d; 0 if d is 0.
FUSED_KD_INLINE Floats signed_like(Floats x, Floats d) {
  const Words flipped = bits(x) ^ (bits(d) & 0x80000000u);
  return floats(flipped & reinterpret_cast<Words>(d != Floats{}));
}

// The lanes from W on in the place of the first; the others have no meaning.
template <int W>
FUSED_KD_INLINE Floats lanes_from(Floats x) {
#if defined(__clang__)
  Floats y = x;
  for (int i = 0; i < W; ++i) y[i] = x[i + W];
  return y;
#else
  Ints index;
  for (int i = 0; i < LANES; ++i) index[i] = i + W;
  return __builtin_shuffle(x, index);  // modulo LANES
#endif
}

// Horizontal sum and maximum, always in the same order.
template <int W = LANES / 2>
FUSED_KD_INLINE float sum(Floats x) {
  x += lanes_from<W>(x);
  if constexpr (W > 1) return sum<W / 2>(x);
  return x[0];
}
template <int W = LANES / 2>
FUSED_KD_INLINE float largest(Floats x) {
  x = max(x, lanes_from<W>(x));
  if constexpr (W > 1) return largest<W / 2>(x);
  return x[0];
}

// The largest |x| that `exponential` takes. Beyond, 2^n is not a normal number (AVX-512 scales by
// any power of two, but the rounding to an integer ends at 2^22).
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
constexpr float EXPONENT_RANGE = 1e6f;
#else
constexpr float EXPONENT_RANGE = 125.0f;
#endif

// 2^(x k) for x k in [-EXPONENT_RANGE, 100], exactly 1 at 0. x k = n + f with |f| <= 1/2, both from
// the unrounded product; 2^f is a minimax polynomial with its constant term fixed to 1: relative
// error 1.7e-7 at degree 5, 2.9e-6 at degree 4 (for results that will be rounded to 8 bits).
template <int DEGREE>
FUSED_KD_INLINE Floats exponential(Floats x, Floats k) {
  static_assert(DEGREE == 4 || DEGREE == 5, "");
  const Floats rounder =
      splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = fma(x, k, rounder);
  const Floats n = shifted - rounder;
  const Floats f = fma(x, k, -n);
  Floats r;
  if constexpr (DEGREE == 5) {
    r = splat(0.0013264714507386088f);
    r = fma(r, f, splat(0.009671512991189957f));
    r = fma(r, f, splat(0.05550733953714371f));
    r = fma(r, f, splat(0.24022242426872253f));
    r = fma(r, f, splat(0.6931470036506653f));
  } else {
    r = splat(0.009582852944731712f);
    r = fma(r, f, splat(0.055906426161527634f));
    r = fma(r, f, splat(0.24024099111557007f));
    r = fma(r, f, splat(0.6931241750717163f));
  }
  r = fma(r, f, splat(1.0f));
#if FUSED_KD_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_scalef_ps((__m512)r, (__m512)n));
#else
  return floats(bits(r) + (bits(shifted) << 23));
#endif
}

// The same for any x <= 0 and k <= EXPONENT_RANGE; exactly 0 if the result would not be a normal
// number.
FUSED_KD_INLINE Floats exponential_any(Floats x, Floats k) {
  const Floats limit = splat(-125.0f) / k;
  return floats(bits(exponential<5>(max(x, limit), k)) & reinterpret_cast<Words>(x >= limit));
}

FUSED_KD_INLINE Floats exp2_moderate(Floats x) { return exponential<5>(x, splat(1.0f)); }

// log2(x) for normal x > 0 in two parts: an integer, and the rest, which is returned. Relative error
// < 3.2e-7, exactly 0 at 1.
FUSED_KD_INLINE Floats log2(Floats x, Floats& integer) {
  const Words sqrt_half = Words{} + 0x3f3504f3u;
  const Ints e = reinterpret_cast<Ints>(bits(x) - sqrt_half) >> 23;
  const Floats f = floats(bits(x) - (reinterpret_cast<Words>(e) << 23)) -
                   splat(1.0f);  // in [sqrt(1/2), sqrt(2)) - 1
  Floats r = splat(-0.14581198990345f);
  r = fma(r, f, splat(0.23404249548912048f));
  r = fma(r, f, splat(-0.24887681007385254f));
  r = fma(r, f, splat(0.2870986759662628f));
  r = fma(r, f, splat(-0.3602396547794342f));
  r = fma(r, f, splat(0.48092323541641235f));
  r = fma(r, f, splat(-0.7213528156280518f));
  r = fma(r, f, splat(1.442694902420044f));
  integer = __builtin_convertvector(e, Floats);
  return r * f;
}
FUSED_KD_INLINE Floats log2(Floats x) {
  Floats integer;
  const Floats rest = log2(x, integer);
  return integer + rest;
}

// Element types: the bits of a bfloat16 and of a half, independent of any framework.
struct Bf16 {
  uint16_t raw;
};
struct Half {
  uint16_t raw;
};

// IEEE half precision in integer arithmetic, for tails and processors without the instruction.
inline float half_to_float(Half h) {
  const uint32_t sign = uint32_t(h.raw & 0x8000u) << 16, magnitude = h.raw & 0x7fffu;
  float result;
  if (magnitude < 0x400u) {  // zero and subnormal: a multiple of 2^-24
    result = float(magnitude) * 5.9604644775390625e-8f;
  } else {
    const uint32_t word =
        magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : (magnitude << 13) + 0x38000000u;
    memcpy(&result, &word, sizeof word);
  }
  uint32_t word;
  memcpy(&word, &result, sizeof word);
  word |= sign;
  memcpy(&result, &word, sizeof word);
  return result;
}
inline Half float_to_half(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  const uint32_t sign = (word >> 16) & 0x8000u;
  word &= 0x7fffffffu;
  uint32_t half;
  if (word > 0x7f800000u) {
    half = 0x7e00u;
  } else if (word >= 0x47800000u) {
    half = 0x7c00u;
  } else if (word < 0x38800000u) {  // subnormal: one addition aligns and rounds
    float small, shift = 0.5f;
    memcpy(&small, &word, sizeof word);
    small += shift;
    memcpy(&half, &small, sizeof half);
    half -= 0x3f000000u;
  } else {  // round to nearest even; a carry walks into the exponent, up to infinity
    half = (word - 0x38000000u + 0xfffu + ((word >> 13) & 1u)) >> 13;
  }
  return {uint16_t(half | sign)};
}

// Rounds to nearest even to bfloat16, in the upper half of each word. A NaN must be canonical,
// since a payload of all ones would carry into the sign; arithmetic on finite inputs gives no
// other.
FUSED_KD_INLINE Words round_to_bf16(Floats x) {
  const Words b = bits(x);
  return b + 0x7fffu + ((b >> 16) & 1u);
}

FUSED_KD_INLINE void load_pair(const float* p, Floats& a, Floats& b) {
  memcpy(&a, p, sizeof a);
  memcpy(&b, p + LANES, sizeof b);
}
FUSED_KD_INLINE void store_pair(float* p, Floats a, Floats b) {
  memcpy(p, &a, sizeof a);
  memcpy(p + LANES, &b, sizeof b);
}
// Even elements in a, odd elements in b: one shift and one mask instead of widening shuffles
// (little endian).
FUSED_KD_INLINE void load_pair(const Bf16* p, Floats& a, Floats& b) {
  Words both;
  memcpy(&both, p, sizeof both);
  a = floats(both << 16);
  b = floats(both & 0xffff0000u);
}
FUSED_KD_INLINE void store_pair(Bf16* p, Floats a, Floats b) {
#if FUSED_KD_LANES == 16 && defined(__AVX512BF16__)
  static const uint16_t interleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(interleave), halves));
#else
#if FUSED_KD_LANES == 8 && defined(__AVX2__)
  const Words both =
      (Words)_mm256_blend_epi16((__m256i)(round_to_bf16(a) >> 16), (__m256i)round_to_bf16(b), 0xaa);
#else
  const Words both = (round_to_bf16(a) >> 16) | (round_to_bf16(b) & 0xffff0000u);
#endif
  memcpy(p, &both, sizeof both);
#endif
}

// Halves, if the processor converts them.
#if defined(__F16C__)
constexpr bool READS_F16 = true;
FUSED_KD_INLINE void load_pair(const Half* p, Floats& a, Floats& b) {
#if FUSED_KD_LANES == 16
  a = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)));
#else
  a = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
#endif
}
FUSED_KD_INLINE void store_pair(Half* p, Floats a, Floats b) {
#if FUSED_KD_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
constexpr bool READS_F16 = false;
#endif

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd
