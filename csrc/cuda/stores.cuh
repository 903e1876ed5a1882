// Narrows and writes groups of a gradient: in whole aligned vectors of 16 bytes at any alignment of
// the row, and in float32 such that a warp's stores fill whole sectors of 32 bytes. To do so,
// neighbours in a warp exchange parts of their groups, if all lanes of the warp are active.
#pragma once

#include "elements.cuh"

namespace fused_kd {

template <Dtype TYPE>
FUSED_KD_DEVICE Raw narrow(const float (&x)[GROUP]) {
  uint32_t words[GROUP] = {};
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    if constexpr (TYPE == Dtype::f32)
      words[e] = same_bits<uint32_t>(x[e]);
    else if (e % 2 == 0)
      words[e / 2] = TYPE == Dtype::bf16 ? pack_bf16(x[e], x[e + 1]) : pack_f16(x[e], x[e + 1]);
  }
  return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

// Stores bytes [begin, end) of a group, two or four at a time: at the ends of a misaligned row, and
// of the last, partial group.
template <Dtype TYPE>
FUSED_KD_DEVICE void store_bytes(char* p, const Raw& raw, int begin, int end) {
  const uint32_t words[GROUP] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                 raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    if (e * width(TYPE) < begin || e * width(TYPE) >= end) continue;
    if constexpr (TYPE == Dtype::f32)
      reinterpret_cast<uint32_t*>(p)[e] = words[e];
    else
      reinterpret_cast<uint16_t*>(p)[e] = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
  }
}

// Returns another lane's vector. Afterwards the lanes may write, in place, since all have read.
FUSED_KD_DEVICE Bits16 from_lane(Bits16 v, int lane) {
  warp_sync();
  return {shuffle(v.x, lane), shuffle(v.y, lane), shuffle(v.z, lane), shuffle(v.w, lane)};
}

// Stores the consecutive groups of a warp's lanes in a row that is not aligned. Each lane writes
// the aligned vectors that end in its group; the first lane's leading bytes and the last lane's
// trailing bytes are written element by element.
template <Dtype TYPE>
FUSED_KD_DEVICE void store_shifted(char* p, int misaligned, const Raw& raw) {
  constexpr int BYTES = GROUP * width(TYPE);
  const int lane = threadIdx.x % 32, begin = 16 - misaligned;
  const Bits16 before = from_lane(TYPE == Dtype::f32 ? raw.high : raw.low, lane > 0 ? lane - 1 : 0);
  if (lane > 0)
    store16(p - misaligned, part_of(before, raw.low, begin));
  else
    store_bytes<TYPE>(p, raw, 0, begin);
  if constexpr (TYPE == Dtype::f32) store16(p + begin, part_of(raw.low, raw.high, begin));
  if (lane == 31) store_bytes<TYPE>(p, raw, BYTES - misaligned, BYTES);
}

// Stores the float32 groups of two lanes: each writes a half of either, so that stores fill
// sectors.
FUSED_KD_DEVICE void store_pair(char* p, const Raw& raw) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2;
  const Bits16 got = from_lane(odd ? raw.low : raw.high, lane ^ 1);
  char* half = p - (odd ? 16 : 0);  // of the even lane's group
  store16(half, odd ? got : raw.low);
  store16(half + 32, odd ? raw.high : got);
}

// Stores a whole, aligned group. together: all lanes of the warp do the same.
template <Dtype TYPE>
FUSED_KD_DEVICE void store_aligned(char* p, bool together, const Raw& raw) {
  if (TYPE == Dtype::f32 && together) return store_pair(p, raw);
  store16(p, raw.low);
  if constexpr (TYPE == Dtype::f32) store16(p + 16, raw.high);
}

// Stores a group. together: all lanes of the warp call this, for consecutive groups.
template <Dtype TYPE>
FUSED_KD_DEVICE void store_group(const RowView& row, int group, bool together,
                                 const float (&x)[GROUP]) {
  const Raw raw = narrow<TYPE>(x);
  char* p = row.data + static_cast<int64_t>(group) * (GROUP * width(TYPE));
  const int lane = threadIdx.x % 32, left = row.entries - group * GROUP;
  const bool all_whole = together && (group - lane + 32) * GROUP <= row.entries;
  if (row.misaligned && all_whole) return store_shifted<TYPE>(p, row.misaligned, raw);
  if (row.misaligned || left < GROUP)
    return store_bytes<TYPE>(p, raw, 0, (left < GROUP ? left : GROUP) * width(TYPE));
  store_aligned<TYPE>(p, all_whole, raw);
}

// The same for a row whose groups are all whole and aligned.
template <Dtype TYPE>
FUSED_KD_DEVICE void store_plain_group(const RowView& row, int group, bool together,
                                       const float (&x)[GROUP]) {
  store_aligned<TYPE>(row.data + static_cast<int64_t>(group) * (GROUP * width(TYPE)), together,
                      narrow<TYPE>(x));
}

// Stores element v of a row.
FUSED_KD_DEVICE void store_element(const RowView& row, int v, float x) {
  if (row.dtype == Dtype::f32)
    reinterpret_cast<float*>(row.data)[v] = x;
  else
    reinterpret_cast<uint16_t*>(row.data)[v] =
        static_cast<uint16_t>(row.dtype == Dtype::bf16 ? pack_bf16(x, x) : pack_f16(x, x));
}

template <Dtype TYPE>
struct Constant {
  static constexpr Dtype value = TYPE;
};

// Stores a group in the student's type, or in 16 bits for a float32 student.
template <Dtype S, bool PLAIN>
FUSED_KD_DEVICE void store_gradient(const RowView& row, int group, bool together,
                                    const float (&x)[GROUP]) {
  const auto store = [&](auto constant) {
    constexpr Dtype TYPE = decltype(constant)::value;
    PLAIN ? store_plain_group<TYPE>(row, group, together, x)
          : store_group<TYPE>(row, group, together, x);
  };
  if (S != Dtype::f32 || row.dtype == Dtype::f32)
    store(Constant<S>{});
  else if (row.dtype == Dtype::bf16)
    store(Constant<Dtype::bf16>{});
  else
    store(Constant<Dtype::f16>{});
}

}  // namespace fused_kd
