// The GPU's conversions and fast exponentials, for the emulator.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fused_kd {

namespace emulator {

inline float from_word(uint32_t word) {
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
}

inline uint32_t to_word(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
}

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

inline uint32_t to_bf16(float x) {
  const uint32_t word = to_word(x);
  if (isnan(x)) return 0x7fff;  // what the GPU makes of every NaN
  return (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

inline uint32_t to_f16(float x) {
  const uint32_t sign = (to_word(x) >> 16) & 0x8000, word = to_word(x) & 0x7fffffff;
  if (isnan(x)) return 0x7fff;
  if (word >= to_word(65520.0f)) return sign | 0x7c00;
  if (word < to_word(0x1p-14f)) {  // subnormal: the addition rounds to a multiple of 2^-24
    return sign | (to_word(from_word(word) + 0.5f) - to_word(0.5f));
  }
  return sign | ((word - (112u << 23) + 0xfff + ((word >> 13) & 1)) >> 13);
}

}  // namespace emulator

inline float exp2_fast(float x) { return emulator::flush(exp2f(emulator::flush(x))); }

inline float from_bf16(uint32_t low16) { return emulator::from_word(low16 << 16); }

inline float from_f16(uint32_t low16) {
  const uint32_t sign = (low16 & 0x8000) << 16, exponent = (low16 >> 10) & 31, m = low16 & 0x3ff;
  if (exponent == 0) return emulator::from_word(sign | emulator::to_word(float(m) * 0x1p-24f));
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return emulator::from_word(sign | biased << 23 | m << 13);
}

inline uint32_t pack_bf16(float low, float high) {
  return emulator::to_bf16(low) | emulator::to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return emulator::to_f16(low) | emulator::to_f16(high) << 16;
}

}  // namespace fused_kd
