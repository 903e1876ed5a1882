// Sizes that decide how a row is divided. Tests make them small, so that short rows take every
// path.
#pragma once

namespace fused_kd {

#ifdef FUSED_KD_SMALL_SIZES
constexpr int THREADS = 64;
constexpr int GLOBAL_SLICE_BYTES = 2048;
constexpr int RING_RECORDS = 8;
constexpr int SCALE_BLOCKS = 1;
constexpr int MEASURED_SLICE = 64;
#else
constexpr int THREADS = 256;
// Bytes of a block's slice in global memory, both sides together, unless MAX_PARTS limits the
// number of parts. The rows in flight (2 or 3 blocks on each of a hundred multiprocessors) then
// stay in an L2 of 40 MB between passes.
constexpr int GLOBAL_SLICE_BYTES = 48 * 1024;
// Records in the ring in global memory: ten times the number in flight at once.
constexpr int RING_RECORDS = 4096;
constexpr int SCALE_BLOCKS = 6;  // of scale_rows on a multiprocessor
// Groups of a slice of measure_support: three blocks of its mask, of as many bytes, fit on any
// multiprocessor.
constexpr int MEASURED_SLICE = 16 * 1024;
#endif

constexpr int GENERAL_BLOCKS = 2;              // of rows_general on a multiprocessor, at least
constexpr int MAX_PARTS = 16;                  // blocks of one row
constexpr int CHUNK_GROUPS = 2;                // groups of a thread that arrive together
constexpr int CHUNK = CHUNK_GROUPS * THREADS;  // groups of a slice that arrive together
constexpr int MAX_CHUNKS = 16;                 // of one slice

}  // namespace fused_kd
