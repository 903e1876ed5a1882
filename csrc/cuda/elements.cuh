// Reads a row's elements in groups of eight, at any alignment, and widens them.
//
// Groups begin at multiples of eight from the row's first element, regardless of its address, so
// that the same row gives the same bits at any address.
#pragma once

#include "../problem.h"
#ifdef FUSED_KD_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "primitives.cuh"
#endif
#if defined(FUSED_KD_CUDA_ON_CPU) || __CUDA_ARCH__ >= 900
#define FUSED_KD_HAS_CLUSTERS
#endif

namespace fused_kd {

constexpr int GROUP = 8;
#define FUSED_KD_DEVICE __device__ __forceinline__

// Eight elements as stored in memory; `high` only for float.
struct Raw {
  Bits16 low, high;
};

// The same bits as another type of the same size.
template <class To, class From>
FUSED_KD_DEVICE To same_bits(From x) {
  union {
    From from;
    To to;
  } u = {x};
  return u.to;
}

template <Dtype TYPE>
FUSED_KD_DEVICE void widen(const Raw& raw, float (&x)[GROUP]) {
  const uint32_t words[GROUP] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                 raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    if constexpr (TYPE == Dtype::f32)
      x[e] = same_bits<float>(words[e]);
    else if constexpr (TYPE == Dtype::bf16)
      x[e] =
          e % 2 ? same_bits<float>(words[e / 2] & 0xffff0000u) : from_bf16(words[e / 2] & 0xffffu);
    else
      x[e] = from_f16(e % 2 ? words[e / 2] >> 16 : words[e / 2] & 0xffffu);
  }
}

// The index of a row as two indices, for its two strides. Computed once per row, since it divides.
struct RowIndex {
  uint32_t outer = 0, inner;

  // 32 bits suffice (launch.cu checks), and divide in an eighth of the time of 64
  FUSED_KD_DEVICE RowIndex(int64_t n, int64_t rows) : inner(static_cast<uint32_t>(n)) {
    if (n < rows) return;  // always true for a matrix
    outer = inner / static_cast<uint32_t>(rows);
    inner -= outer * static_cast<uint32_t>(rows);
  }
};

// Returns element v of the elements at `data`, widened.
FUSED_KD_DEVICE float element_of(const void* data, Dtype dtype, int v) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[v];
  const uint32_t bits = static_cast<const uint16_t*>(data)[v];
  return dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

// One row of a tensor, of V elements.
struct RowView {
  char* data;
  Dtype dtype;
  int entries;     // V
  int misaligned;  // the address modulo 16

  // dtype: that of the rows, as a compile-time constant if the caller knows it
  FUSED_KD_DEVICE RowView(const Rows& rows, Dtype dtype, RowIndex at, int entries)
      : dtype(dtype), entries(entries) {
    const int64_t offset = at.outer * rows.outer_stride + at.inner * rows.inner_stride;
    data = static_cast<char*>(rows.data) + offset * width(dtype);
    misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) & 15);
  }

  // Returns whether every group is whole and aligned to 16 bytes.
  FUSED_KD_DEVICE bool is_plain() const { return misaligned == 0 && entries % GROUP == 0; }

  FUSED_KD_DEVICE float element(int v) const { return element_of(data, dtype, v); }
};

// Returns 16 of 32 bytes, from byte `first` on, an even number below 16.
FUSED_KD_DEVICE Bits16 part_of(Bits16 a, Bits16 b, int first) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (first & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (first & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  if (first & 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
  }
  return {w[0], w[1], w[2], w[3]};
}

// Loads the 16 bytes at p, which is `misaligned` bytes after an aligned address, from the 32
// aligned bytes around them.
FUSED_KD_DEVICE Bits16 load16_shifted(const char* p, int misaligned) {
  return part_of(load16_in_part(p - misaligned), load16_in_part(p - misaligned + 16), misaligned);
}

// Loads a group element by element: at the ends of a misaligned row, and its last, partial group.
// Missing elements are -inf, which is an absent entry.
FUSED_KD_DEVICE Raw load_ragged(const RowView& row, int group) {
  uint32_t words[GROUP] = {};
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    const int v = group * GROUP + e;
    if (row.dtype == Dtype::f32) {
      words[e] = v < row.entries ? reinterpret_cast<const uint32_t*>(row.data)[v] : 0xff800000u;
    } else {
      const uint32_t missing = row.dtype == Dtype::bf16 ? 0xff80u : 0xfc00u;
      const uint32_t bits =
          v < row.entries ? reinterpret_cast<const uint16_t*>(row.data)[v] : missing;
      words[e / 2] |= bits << (e % 2 * 16);
    }
  }
  return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

// Loads a group of a row. A shifted load touches up to 16 bytes on either side, which are inside
// the row except for its first and last groups.
FUSED_KD_DEVICE Raw load_group(const RowView& row, int group) {
  const bool whole = (group + 1) * GROUP <= row.entries;
  const bool inside = group > 0 && (group + 2) * GROUP <= row.entries;
  if (!(row.misaligned ? inside : whole)) return load_ragged(row, group);
  const char* p = row.data + static_cast<int64_t>(group) * (GROUP * width(row.dtype));
  Raw raw = {};
  if (row.misaligned) {
    raw.low = load16_shifted(p, row.misaligned);
    if (row.dtype == Dtype::f32) raw.high = load16_shifted(p + 16, row.misaligned);
  } else {
    raw.low = load16(p);
    if (row.dtype == Dtype::f32) raw.high = load16(p + 16);
  }
  return raw;
}

// Widens a teacher's group, whose type is selected at run time if it is not the student's.
template <Dtype S, bool SAME>
FUSED_KD_DEVICE void widen_teacher(const Raw& raw, Dtype dtype, float (&x)[GROUP]) {
  if (SAME)
    widen<S>(raw, x);
  else if (dtype == Dtype::f32)
    widen<Dtype::f32>(raw, x);
  else if (dtype == Dtype::bf16)
    widen<Dtype::bf16>(raw, x);
  else
    widen<Dtype::f16>(raw, x);
}

}  // namespace fused_kd
