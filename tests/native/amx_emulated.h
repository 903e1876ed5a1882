// The AMX intrinsics that csrc/cpu/ uses, with the semantics that Intel documents for ldtilecfg,
// tileloadd, tilestored and tdpbf16ps.
//
// Included before everything else (g++ -include), after avx512_emulated.h. A use that the processor
// would refuse ends the program.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace amx_emulated {

inline void demand(bool holds, const char* what) {
  if (holds) return;
  printf("FAILED AMX: %s\n", what);
  abort();
}

struct Register {
  int rows = 0, row_bytes = 0;
  unsigned char row[16][64];
};
inline thread_local Register registers[8];
inline thread_local bool configured = false;

// Returns a register that an instruction may use.
inline Register& tile(int index) {
  demand(configured && index >= 0 && index < 8, "no tile configuration");
  demand(registers[index].rows > 0 && registers[index].row_bytes > 0, "the tile has no size");
  return registers[index];
}
inline void clear(Register& x) { memset(x.row, 0, sizeof x.row); }

inline void loadconfig(const void* from) {
  demand(!configured, "the last configuration was not released");  // the processor would take it
  unsigned char memory[64];
  memcpy(memory, from, sizeof memory);
  demand(memory[0] == 1, "the palette is not 1");
  for (int i = 1; i < 16; ++i) demand(memory[i] == 0, "a reserved byte is not 0");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, memory + 16 + 2 * i, 2);
    const int rows = memory[48 + i];
    demand(i < 8 ? row_bytes <= 64 && rows <= 16 && !row_bytes == !rows : !row_bytes && !rows,
           "the size of a tile");
    if (i >= 8) continue;
    registers[i].rows = rows;
    registers[i].row_bytes = row_bytes;
    clear(registers[i]);
  }
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int to) { clear(tile(to)); }
inline void loadd(int to, const void* from, int64_t stride) {
  Register& x = tile(to);
  clear(x);
  for (int i = 0; i < x.rows; ++i)
    memcpy(x.row[i], static_cast<const char*>(from) + i * stride, size_t(x.row_bytes));
}
inline void stored(int from, void* to, int64_t stride) {
  const Register& x = tile(from);
  for (int i = 0; i < x.rows; ++i)
    memcpy(static_cast<char*>(to) + i * stride, x.row[i], size_t(x.row_bytes));
}

// Even and odd elements are summed separately, with a fused multiply-add each, then both sums
// are added, then the register's value. Subnormal operands and results become zeros.
inline void dpbf16ps(int to, int left, int right) {
  using avx512_emulated::without_subnormal;
  Register& c = tile(to);
  const Register &a = tile(left), &b = tile(right);
  demand(to != left && to != right && left != right, "a tile is used twice");
  demand(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows,
         "the sizes of the tiles do not fit");
  const auto element = [](const Register& x, int i, int j) {
    uint16_t word;
    memcpy(&word, x.row[i] + 2 * j, 2);
    return avx512_emulated::from_bf16(word);
  };
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float sum[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sum[odd] = without_subnormal(
              __builtin_fmaf(element(a, m, 2 * k + odd), element(b, k, 2 * n + odd), sum[odd]));
      float value;
      memcpy(&value, c.row[m] + 4 * n, 4);
      value = without_subnormal(without_subnormal(value) + without_subnormal(sum[0] + sum[1]));
      memcpy(c.row[m] + 4 * n, &value, 4);
    }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulated::loadconfig
#define _tile_release amx_emulated::release
#define _tile_zero amx_emulated::zero
#define _tile_loadd amx_emulated::loadd
#define _tile_stored amx_emulated::stored
#define _tile_dpbf16ps amx_emulated::dpbf16ps
