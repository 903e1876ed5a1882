// What the check programs share: counted expectations, bits of numbers, buffers of exact size.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/amx.h"
#include "../../csrc/cpu/kernels.h"

// In place of csrc/cpu/amx.cpp: what the processor lacks is emulated.
inline bool amx_is_granted = true;
namespace fused_kd {
bool has_amx() { return true; }
bool request_amx() { return amx_is_granted; }
}  // namespace fused_kd

inline int failures = 0, checks = 0;

inline void expect(bool ok, const std::string& what, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) printf("FAILED %s: got %.9g, want %.9g\n", what.c_str(), got, want);
}
inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) printf("FAILED %s\n", what.c_str());
}
inline void expect_near(double got, double want, double tolerance, const std::string& what) {
  expect(fabs(got - want) <= tolerance, what, got, want);
}

inline float from_bits(uint32_t word) {
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof x);
  return word;
}
inline uint16_t to_bf16(float x) {
  const uint32_t word = to_bits(x);
  return uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

// Elements of one type, one element off the allocator's alignment, nothing behind the last.
class Buffer {
 public:
  Buffer(const std::vector<float>& values, bool bf16)
      : width_(bf16 ? 2 : 4), size_(values.size()), bytes_(new char[(values.size() + 1) * width_]) {
    for (size_t i = 0; i < size_; ++i) {
      const uint16_t half = to_bf16(values[i]);
      memcpy(data() + i * width_, bf16 ? (const void*)&half : (const void*)&values[i], width_);
    }
  }
  char* data() { return bytes_.get() + width_; }
  float operator[](size_t i) const {
    uint32_t word = 0;
    const char* p = bytes_.get() + (i + 1) * width_;
    memcpy(reinterpret_cast<char*>(&word) + 4 - width_, p, width_);  // little endian
    return from_bits(word);
  }
  bool same(const Buffer& other) const {
    return !memcmp(bytes_.get() + width_, other.bytes_.get() + width_, size_ * width_);
  }

 private:
  size_t width_, size_;
  std::unique_ptr<char[]> bytes_;
};

// Rounding of an exponential, plus that of LANES chains of additions: half a unit each, at most.
// Without a fused multiply-add the exponent is rounded too.
inline double tolerance(const fused_kd::Kernels& table, int size) {
  const bool fused = strcmp(table.name, "generic") != 0;
  return (fused ? 5e-7 : 4e-6) + size / 16 * 6e-8;
}

// Prints the count; the exit status. No check at all is a failure too.
inline int finish() {
  printf("%d checks, %d failed\n", checks, failures);
  return failures || checks == 0 ? 1 : 0;
}
