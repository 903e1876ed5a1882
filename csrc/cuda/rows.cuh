// The two kernels that visit rows: losses, statistics and gradients of every divergence.
//
// Read and written, per element, for loss and gradient together:
//     rows_general   each logit twice from memory (the second time mostly from the second-level
//                    cache, by several blocks a row), each gradient once; any alignment; sm_75 on
//     rows_cluster   each logit once, into the shared memory of a cluster of blocks; sm_90 on
// Accumulated in float; see sums.cuh. A block whose row is off (both weights 0) reads nothing of
// it.
#pragma once

#include "sources.cuh"

namespace fused_kd {

constexpr int WARPS = THREADS / 32;

// The head of a block's shared memory; slices of a row begin at NEAR_MEMORY.
constexpr int NEAR_MEMORY = 640;
struct Shared {
  Record records[WARPS];  // of the block's warps
  Record block[2];        // of the block, for its cluster, in either round
  float told[16];         // what the first thread tells the others
  uint32_t ticket;
  uint64_t barriers[MAX_CHUNKS];
};
static_assert(sizeof(Shared) <= NEAR_MEMORY, "the head overlaps the slices");

// What the first thread makes of a row's record, for all: divisions are done once. Between two
// calls the block meets.
template <class T>
FUSED_KD_DEVICE T told_by_first(const Params& p, const Row& row, const Record& record,
                                Shared& shared) {
  static_assert(sizeof(T) <= sizeof shared.told, "no room for what is told");
  T* told = reinterpret_cast<T*>(shared.told);
  if (threadIdx.x == 0) *told = T(p, row, record);
  block_sync();
  return *told;
}

// The block's record, in every lane of warp 0.
template <Divergence D>
FUSED_KD_DEVICE Record merge_block(Record record, const Options& o, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  merge_warp<D>(record, o);
  if (lane == 0) shared.records[warp] = record;
  block_sync();
  if (warp != 0) return record;
  record = lane < WARPS ? shared.records[lane] : empty_record();
  merge_warp<D>(record, o);
  return record;
}

// Sums of a second visit, over the lanes of a warp.
FUSED_KD_DEVICE void merge_second_warp(Record& record) {
  record.r.x = warp_sum(record.r.x);
  record.r.y = warp_sum(record.r.y);
}

FUSED_KD_DEVICE Record merge_second_block(Record record, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  merge_second_warp(record);
  if (lane == 0) shared.records[warp] = record;
  block_sync();
  if (warp != 0) return record;
  const bool here = lane < WARPS;
  record.r.x = here ? shared.records[lane].r.x : 0.0f;
  record.r.y = here ? shared.records[lane].r.y : 0.0f;
  merge_second_warp(record);
  return record;
}

// Written by another block: not to be taken from this multiprocessor's first-level cache.
FUSED_KD_DEVICE Record read_far(const Record& record) {
  Record copy;
  const volatile float* from = reinterpret_cast<const volatile float*>(&record);
#pragma unroll
  for (int i = 0; i < STATS; ++i) reinterpret_cast<float*>(&copy)[i] = from[i];
  return copy;
}

// Blocks of one row that meet in far memory. Rows are numbered in the order in which their blocks
// really started (tickets), and a block only waits for blocks of its own row or of earlier ones:
// those that wait for a block that has not started all belong to the row that started last;
// everything else runs to its end and makes room. So there must be room for the blocks of one row
// (launch.cu sees to it), not for the grid; of launches that run at once, for one row of each.
// Records lie in a ring: a row takes the place of the row `ring` before it, once that has been
// read.
struct FarExchange {
  const Params& p;
  int64_t n;
  int part;
  int rounds;
  Shared& shared;

  FUSED_KD_DEVICE Record* records(int round) const {
    return p.partials + ((round - 1) * p.ring + static_cast<int>(n) % p.ring) * p.parts;
  }

  FUSED_KD_DEVICE void wait_for_place() const {
    if (n >= p.ring) wait_until(p.finished + n - p.ring, static_cast<uint32_t>(p.parts));
  }

  // Nothing more is read or written by this block.
  FUSED_KD_DEVICE void finish() const { arrive(p.finished + n); }

  // Warp 0 gets the record of the whole row; without `everyone`, only part 0 does, and the others
  // return false.
  template <class Merge>
  FUSED_KD_DEVICE bool operator()(Record& record, int round, bool everyone, Merge merge) const {
    if (p.parts > 1) {
      const bool goes_on = part == 0 || everyone;
      if (threadIdx.x == 0) {
        if (round == 1) wait_for_place();
        records(round)[part] = record;
        arrive(p.arrived + n);
        if (!goes_on) finish();
        if (goes_on) wait_until(p.arrived + n, static_cast<uint32_t>(round * p.parts));
      }
      if (!goes_on) return false;
      if (threadIdx.x < 32) {
        warp_sync();  // thread 0 has waited
        const int lane = threadIdx.x;
        record = lane < p.parts ? read_far(records(round)[lane]) : empty_record();
        merge(record);
        warp_sync();  // all have read
        if (round == rounds && lane == 0) finish();
      }
    }
    return true;
  }
};

#ifdef FUSED_KD_HAS_CLUSTERS

// Blocks of one cluster, which read one another's shared memory: one packed exchange.
struct NearExchange {
  int rounds;
  Shared& shared;

  template <class Merge>
  FUSED_KD_DEVICE bool operator()(Record& record, int round, bool, Merge merge) const {
    if (cluster_blocks() == 1) return true;
    if (threadIdx.x == 0) shared.block[round - 1] = record;
    cluster_sync();
    if (threadIdx.x < 32) {
      const bool here = threadIdx.x < cluster_blocks();
      record = here ? *cluster_peer(&shared.block[round - 1], threadIdx.x) : empty_record();
      merge(record);
    }
    if (round == rounds) cluster_arrive();  // nothing of the peers' is read any more
    return true;
  }

  // What the peers read must stay until they have: nobody waits for a peer's gradient.
  FUSED_KD_DEVICE void finish() const {
    if (cluster_blocks() > 1) cluster_wait();
  }
};

#endif

// Losses and statistics of a row, and its gradient if there is one.
template <Divergence D, Dtype S, class Source, class Exchange>
FUSED_KD_DEVICE void visit_row(const Params& p, const Row& row, const Source& source, int part,
                               Shared& shared, Exchange exchange) {
  const Options& o = p.options;
  const bool has_gradient = p.grad.data != nullptr;
  Record record = merge_block<D>(first_visit<D>(source, o), o, shared);
  const auto merge = [&](Record& r) { merge_warp<D>(r, o); };
  if (!exchange(record, 1, has_gradient || RuleOf<D>::TWO_VISITS, merge)) return;
  if constexpr (RuleOf<D>::TWO_VISITS) {
    const Second<D> second = told_by_first<Second<D>>(p, row, record, shared);
    second_visit<D>(source, o, second, record.r.x, record.r.y);
    record = merge_second_block(record, shared);
    if (!exchange(record, 2, has_gradient, merge_second_warp)) return;
  }
  if (part == 0 && threadIdx.x == 0) write_losses<D>(p, row, record);
  if (has_gradient)
    gradient_visit<D, S>(p, row, source, told_by_first<Gradient<D>>(p, row, record, shared));
}

// A row that is off: nothing is read.
template <Dtype S, class Source>
FUSED_KD_DEVICE void skip_row(const Params& p, const Row& row, const Source& source, int part) {
  if (p.grad.data != nullptr) zero_gradient<S>(p, row, source);
  if (part != 0 || threadIdx.x != 0) return;
  p.hard[row.n] = p.soft[row.n] = 0.0f;
  reinterpret_cast<Record*>(p.stats)[row.n] = empty_record();
}

// The gradient from an earlier launch's statistics: blocks need not meet, so a few stride over all
// rows. Those with nothing to do leave at once.
template <Divergence D, Dtype S, bool SAME>
FUSED_KD_DEVICE void gradients_from_statistics(const Params& p) {
  if (p.unless_exact && is_exact(*p.scale)) return;
  for (uint32_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const int part = static_cast<int>(unit % p.parts);
    Row row(p, p.first_row + unit / p.parts);
    const FarRow<D, S, SAME> source(p, row, part);
    if (!row.hard && !row.soft) {
      zero_gradient<S>(p, row, source);
      continue;
    }
    row.read_label(p, false);
    const Record& record = reinterpret_cast<const Record*>(p.stats)[row.n];
    gradient_visit<D, S>(p, row, source, Gradient<D>(p, row, record));
  }
}

// Any number of blocks a row; they meet in far memory. Grid: p.units, or less from statistics.
// Budget: 128 registers, NEAR_MEMORY bytes of shared memory.
template <Divergence D, Dtype S, bool SAME>
__global__ void __launch_bounds__(THREADS, GENERAL_BLOCKS)
    rows_general(const __grid_constant__ Params p) {
  if (p.from_stats) return gradients_from_statistics<D, S, SAME>(p);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  uint32_t number = blockIdx.x;
  if (p.parts > 1) {
    if (threadIdx.x == 0) shared.ticket = take_ticket(p.tickets);
    block_sync();
    number = shared.ticket - static_cast<uint32_t>(p.first_row * p.parts);
  }
  const int64_t n = p.first_row + number / p.parts;
  const int part = static_cast<int>(number % p.parts);
  Row row(p, n);
  const FarRow<D, S, SAME> source(p, row, part);
  const FarExchange exchange{p, n, part, RuleOf<D>::TWO_VISITS ? 2 : 1, shared};
  if (!row.hard && !row.soft) {
    if (p.parts > 1 && threadIdx.x == 0) {
      exchange.wait_for_place();
      exchange.finish();
    }
    return skip_row<S>(p, row, source, part);
  }
  if (threadIdx.x == 0) row.read_label(p, part == 0);
  visit_row<D, S>(p, row, source, part, shared, exchange);
}

// A cluster of p.parts blocks a row; each holds its slice of both sides in shared memory. Budget:
// 80 registers (128 for jsd, which is bound by arithmetic), a third of a multiprocessor's shared
// memory.
template <Divergence D, Dtype S, bool SAME>
__global__ void __launch_bounds__(THREADS, D == Divergence::jsd ? 2 : 3)
    rows_cluster(const __grid_constant__ Params p) {
#ifdef FUSED_KD_HAS_CLUSTERS
  unsigned char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t n = p.first_row + (blockIdx.x >> p.parts_log2);
  const int part = static_cast<int>(cluster_rank());
  Row row(p, n);
  const NearRow<D, S, SAME> source(p, row, part, memory + NEAR_MEMORY, shared.barriers);
  if (!row.hard && !row.soft) return skip_row<S>(p, row, source, part);
  source.load();
  if (threadIdx.x == 0) row.read_label(p, part == 0);
  block_sync();
  const NearExchange exchange{RuleOf<D>::TWO_VISITS ? 2 : 1, shared};
  visit_row<D, S>(p, row, source, part, shared, exchange);
  exchange.finish();
#elif defined(__CUDA_ARCH__)
  __trap();  // launch.cu does not choose it here
#endif
}

// A gradient times p.scale; entries of 0 stay 0 whatever it is. Any grid: blocks stride over
// p.units, and leave at once where there is nothing to do. Budget: 40 registers.
template <Dtype S>
__global__ void __launch_bounds__(THREADS, SCALE_BLOCKS)
    scale_rows(const __grid_constant__ Params p) {
  const float scale = *p.scale;
  if (scale == 1.0f || (p.unless_exact && !is_exact(scale))) return;
  for (uint32_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const RowIndex at(p.first_row + unit / p.parts, p.grad.inner);
    const RowView grad(p.grad, S, at, p.entries);
    const Slice slice(p, static_cast<int>(unit % p.parts));
    for (int g = slice.begin + threadIdx.x; g < slice.end; g += THREADS) {
      float x[GROUP];
      widen<S>(load_group(grad, g), x);
#pragma unroll
      for (int e = 0; e < GROUP; ++e) x[e] = x[e] == 0.0f ? x[e] : x[e] * scale;
      store_group<S>(grad, g, slice.together(g), x);
    }
  }
}

}  // namespace fused_kd
