// The AVX-512 intrinsics that csrc/cpu/ uses, in scalar loops with the documented semantics, so
// that a processor without AVX-512 proves the AVX-512 sources.
//
// Included before everything else (g++ -include) with -mavx2 -mfma -mf16c; with EMULATE_AVX512BF16
// also the bfloat16 conversion and product. An intrinsic that is missing here does not compile: its own
// definition requires the instruction set.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#error "the emulation is for a compilation without AVX-512"
#endif
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef EMULATE_AVX512BF16
#define __AVX512BF16__ 1
#endif

namespace avx512_emulated {

struct Singles {
  float lane[16];
  explicit Singles(__m512 v) { memcpy(lane, &v, sizeof lane); }
  __m512 vector() const {
    __m512 v;
    memcpy(&v, lane, sizeof lane);
    return v;
  }
};
struct Shorts {
  uint16_t lane[32] = {};
  Shorts() = default;
  explicit Shorts(__m512i v) { memcpy(lane, &v, sizeof lane); }
  __m512i vector() const {
    __m512i v;
    memcpy(&v, lane, sizeof lane);
    return v;
  }
};

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Singles x(a), y(b), z(c);
  for (int i = 0; i < 16; ++i) z.lane[i] = __builtin_fmaf(x.lane[i], y.lane[i], z.lane[i]);
  return z.vector();
}

// The second operand if one is NaN, and if both are zeros.
inline __m512 max_ps(__m512 a, __m512 b) {
  Singles x(a), y(b);
  for (int i = 0; i < 16; ++i) y.lane[i] = x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i];
  return y.vector();
}
inline __m512 min_ps(__m512 a, __m512 b) {
  Singles x(a), y(b);
  for (int i = 0; i < 16; ++i) y.lane[i] = x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i];
  return y.vector();
}

// a * 2^floor(b), rounded once, subnormal results included.
inline float scalef(float a, float b) {
  if (isnan(a)) return isinf(b) ? (b > 0 ? INFINITY : 0.0f) : a;  // a quiet NaN
  if (isnan(b)) return b;
  if (b == INFINITY) return a == 0 ? NAN : copysignf(INFINITY, a);
  if (b == -INFINITY) return isinf(a) ? NAN : copysignf(0.0f, a);
  const float n = floorf(b);
  return ldexpf(a, n > 1000 ? 1000 : n < -1000 ? -1000 : int(n));
}
inline __m512 scalef_ps(__m512 a, __m512 b) {
  Singles x(a), y(b);
  for (int i = 0; i < 16; ++i) x.lane[i] = scalef(x.lane[i], y.lane[i]);
  return x.vector();
}

// Round to nearest even; subnormals become zeros, a NaN a quiet one with what fits of its payload.
inline uint16_t to_bf16(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  if ((word & 0x7f800000u) == 0) return uint16_t((word >> 16) & 0x8000u);
  if (isinf(x)) return uint16_t(word >> 16);
  if (isnan(x)) return uint16_t((word >> 16) | 0x40u);
  return uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}
// The lower half of the result from the second operand.
inline __m512i cvtne2ps_pbh(__m512 a, __m512 b) {
  Singles upper(a), lower(b);
  Shorts out;
  for (int i = 0; i < 16; ++i) {
    out.lane[i] = to_bf16(lower.lane[i]);
    out.lane[16 + i] = to_bf16(upper.lane[i]);
  }
  return out.vector();
}

inline __m256i cvtneps_pbh(__m512 x) {
  Singles from(x);
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(from.lane[i]);
  __m256i out;
  memcpy(&out, to, sizeof out);
  return out;
}

// To and from half precision, by the 256-bit instructions.
inline __m512 cvtph_ps(__m256i x) {
  __m128i half[2];
  memcpy(half, &x, sizeof half);
  const __m256 both[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  __m512 out;
  memcpy(&out, both, sizeof out);
  return out;
}
template <int ROUNDING>
inline __m256i cvtps_ph(__m512 x) {
  __m256 half[2];
  memcpy(half, &x, sizeof half);
  const __m128i both[2] = {_mm256_cvtps_ph(half[0], ROUNDING), _mm256_cvtps_ph(half[1], ROUNDING)};
  __m256i out;
  memcpy(&out, both, sizeof out);
  return out;
}

// c + the products of two bfloat16 pairs, the upper one added first; each addition is rounded once,
// subnormal operands and results become zeros.
inline float without_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float from_bf16(uint16_t x) {
  const uint32_t word = uint32_t(x) << 16;
  float out;
  memcpy(&out, &word, sizeof out);
  return without_subnormal(out);
}
template <class Pairs>
inline __m512 dpbf16_ps(__m512 c, Pairs a, Pairs b) {
  Singles sum(c);
  Shorts x, y;
  memcpy(x.lane, &a, sizeof x.lane);
  memcpy(y.lane, &b, sizeof y.lane);
  for (int i = 0; i < 32; ++i) {
    float& s = sum.lane[i / 2];
    const int at = i ^ 1;
    s = without_subnormal(
        __builtin_fmaf(from_bf16(x.lane[at]), from_bf16(y.lane[at]), without_subnormal(s)));
  }
  return sum.vector();
}

inline __m512i permutexvar_epi16(__m512i index, __m512i a) {
  Shorts from(a), to(index);
  for (int i = 0; i < 32; ++i) to.lane[i] = from.lane[to.lane[i] & 31];
  return to.vector();
}

inline __m512i loadu_si512(const void* p) {
  Shorts x;
  memcpy(x.lane, p, 64);
  return x.vector();
}
inline void storeu_si512(void* p, __m512i x) { memcpy(p, &x, 64); }

}  // namespace avx512_emulated

#define _mm512_fmadd_ps avx512_emulated::fmadd_ps
#define _mm512_max_ps avx512_emulated::max_ps
#define _mm512_min_ps avx512_emulated::min_ps
#define _mm512_scalef_ps avx512_emulated::scalef_ps
#define _mm512_loadu_si512 avx512_emulated::loadu_si512
#define _mm512_storeu_si512 avx512_emulated::storeu_si512
#define _mm512_permutexvar_epi16 avx512_emulated::permutexvar_epi16
#define _mm512_cvtph_ps avx512_emulated::cvtph_ps
#undef _mm512_cvtps_ph  // a macro without optimisation
#define _mm512_cvtps_ph(x, rounding) avx512_emulated::cvtps_ph<rounding>(x)
#ifdef EMULATE_AVX512BF16
#define _mm512_dpbf16_ps avx512_emulated::dpbf16_ps
#define _mm512_cvtne2ps_pbh avx512_emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh avx512_emulated::cvtneps_pbh
#endif
