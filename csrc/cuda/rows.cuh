// The two kernels of a row: losses, statistics and gradients of every divergence. classes.cuh has
// their variants for a teacher given by classes.
//
// Memory traffic for loss and gradient together; each gradient is written once:
//     rows_general   reads each logit twice, the second time mostly from L2; several blocks per
//                    row, any alignment, sm_75 and later
//     rows_cluster   reads each logit once, into the shared memory of a cluster of blocks; sm_90
//                    and later
// Sums are in float; see sums.cuh. A row that is off (both weights 0) is not read.
#pragma once

#include "sources.cuh"

namespace fused_kd {

constexpr int WARPS = THREADS / 32;

// What warps, and the blocks of a cluster, exchange in shared memory: the record of the first pass,
// or the sums of the second.
struct alignas(16) First {
  float m_s, m_t, d_s, d_t, d_1, w, differences;
  int count_and_flags;  // 8 * count + flags
};
struct alignas(8) Sums {
  float x, y;
};

FUSED_KD_DEVICE First pack(const Record& record) {
  const RowSums<float>& r = record.r;
  const int count = static_cast<int>(r.count), flags = static_cast<int>(record.flags);
  return {r.m_s, r.m_t, r.d_s, r.d_t, r.d_1, r.w, r.differences, count * 8 + flags};
}

FUSED_KD_DEVICE Record unpack(const First& first) {
  const int flags = first.count_and_flags & 7, count = (first.count_and_flags - flags) / 8;
  return {{first.m_s, first.m_t, first.d_s, first.d_t, first.d_1, first.w, 0.0f, 0.0f,
           first.differences, static_cast<float>(count)},
          static_cast<float>(flags)};
}

// The head of a block's shared memory. In a cluster, the block's slices of a row follow, and then
// the records that each block hands over, in the first and in the second round. With classes the
// mask of the support (classes.cuh) is before the slices.
struct Shared {
  union {  // of the warps of the block
    First first[WARPS];
    Sums second[WARPS];
  };
  float broadcast[16];            // scalars that the first thread computes for the others
  float s_label;                  // row.s_label of the first thread
  uint64_t barriers[MAX_CHUNKS];  // of the slices
  uint64_t handed[2];             // barriers: all blocks have handed over, in either round
  uint32_t ticket;
};
static_assert(sizeof(Shared) % 16 == 0, "slices are not aligned");

// Bytes that each block of a cluster hands over; records: in the first round.
constexpr int handed_bytes(int records) {
  return static_cast<int>(records * sizeof(First) + sizeof(Sums));
}

// Returns, to all threads, the scalars that the first thread computes from a row's statistics, so
// that divisions are done once. Between two calls the block must synchronise.
template <class T, class Statistics>
FUSED_KD_DEVICE T broadcast_from_first(const Params& p, const Row& row,
                                       const Statistics& statistics, Shared& shared) {
  static_assert(sizeof(T) <= sizeof shared.broadcast, "the scalars do not fit");
  T* scalars = reinterpret_cast<T*>(shared.broadcast);
  if (threadIdx.x == 0) *scalars = T(p, row, statistics);
  block_sync();
  return *scalars;
}

// Returns the record of the block, in every lane of warp 0.
template <Divergence D>
FUSED_KD_DEVICE Record merge_block(Record record, const Options& o, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  merge_warp<D>(record, o);
  const First first = pack(record);  // ThreadSanitizer does not see what a call returns into memory
  if (lane == 0) shared.first[warp] = first;
  block_sync();
  if (warp != 0) return record;
  record = lane < WARPS ? unpack(shared.first[lane]) : empty_record();
  merge_warp<D>(record, o);
  return record;
}

FUSED_KD_DEVICE void set_second(Record& record, const Sums& sums) {
  record.r.x = sums.x;
  record.r.y = sums.y;
}

// Adds the sums of the second pass over the lanes of a warp.
FUSED_KD_DEVICE void merge_second_warp(Record& record) {
  record.r.x = warp_sum(record.r.x);
  record.r.y = warp_sum(record.r.y);
}

FUSED_KD_DEVICE Record merge_second_block(Record record, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  merge_second_warp(record);
  if (lane == 0) shared.second[warp] = {record.r.x, record.r.y};
  block_sync();
  if (warp != 0) return record;
  set_second(record, lane < WARPS ? shared.second[lane] : Sums{});
  merge_second_warp(record);
  return record;
}

// Reads a record that another block wrote, bypassing the L1 cache.
FUSED_KD_DEVICE Record read_uncached(const Record& record) {
  Record copy;
  const volatile float* from = reinterpret_cast<const volatile float*>(&record);
#pragma unroll
  for (int i = 0; i < STATS; ++i) reinterpret_cast<float*>(&copy)[i] = from[i];
  return copy;
}

// Returns whether all blocks of a row continue after this round, or part 0 alone.
FUSED_KD_DEVICE bool all_go_on(const Params& p, int round, int rounds) {
  return round < rounds || p.grad.data != nullptr;
}

// Blocks of one row exchange records in global memory. Rows are numbered in the order in which
// their blocks started (tickets), and a block waits only for blocks of its own row or of earlier
// rows. So all blocks that wait for a block that has not started belong to the row that started
// last; all others run to their end and free their multiprocessors. Therefore the blocks of one row
// must be resident at once (launch.cu checks), not the grid; if launches run concurrently, one row
// of each. Records are stored in a ring: a row reuses the place of the row `ring` before it, after
// that row's records have been read. RECORDS: of each block in the first round; the second round
// exchanges the first one alone.
template <int RECORDS>
struct GlobalExchange {
  const Params& p;
  int64_t n;
  int part;
  int rounds;
  Shared& shared;

  // Returns the records of the row's blocks: in slot 0 those of the first round, in 1 those of the
  // second, in 2 the further ones of the first.
  FUSED_KD_DEVICE Record* records(int slot) const {
    return p.partials + (slot * p.ring + static_cast<int>(n) % p.ring) * p.parts;
  }

  FUSED_KD_DEVICE void wait_for_place() const {
    if (n >= p.ring) wait_until(p.finished + n - p.ring, static_cast<uint32_t>(p.parts));
  }

  // Signals that this block reads and writes no more records.
  FUSED_KD_DEVICE void finish() const { arrive(p.finished + n); }

  // Called instead of an exchange, by all threads, for a row that is off.
  FUSED_KD_DEVICE void skip() const {
    if (p.parts == 1 || threadIdx.x != 0) return;
    wait_for_place();
    finish();
  }

  // Gives warp 0 the records of the whole row. Returns false for a block that does not continue.
  template <class Merge>
  FUSED_KD_DEVICE bool operator()(Record (&record)[RECORDS], int round, Merge merge) const {
    if (p.parts > 1) {
      const bool goes_on = part == 0 || all_go_on(p, round, rounds);
      if (threadIdx.x == 0) {
        if (round == 1) wait_for_place();
        records(round - 1)[part] = record[0];
        if (RECORDS > 1 && round == 1) records(2)[part] = record[RECORDS - 1];
        arrive(p.arrived + n);
        if (!goes_on) finish();
        if (goes_on) wait_until(p.arrived + n, static_cast<uint32_t>(round * p.parts));
      }
      if (!goes_on) return false;
      if (threadIdx.x < 32) {
        warp_sync();  // until thread 0 has waited
        const int lane = threadIdx.x;
        record[0] = lane < p.parts ? read_uncached(records(round - 1)[lane]) : empty_record();
        if (RECORDS > 1 && round == 1)
          record[RECORDS - 1] = lane < p.parts ? read_uncached(records(2)[lane]) : empty_record();
        merge(record);
        warp_sync();  // until all lanes have read
        if (round == rounds && lane == 0) finish();
      }
    }
    return true;
  }
};

#ifdef FUSED_KD_HAS_CLUSTERS

// Blocks of one cluster write into the shared memory of all others, and wait for the writes into
// their own: a single trip. A block may end when all writes that it waits for have arrived.
template <int RECORDS>
struct ClusterExchange {
  const Params& p;
  int rounds;
  Shared& shared;
  uint32_t blocks, rank;
  First* first;  // (RECORDS, blocks)
  Sums* second;  // (blocks)

  FUSED_KD_DEVICE ClusterExchange(const Params& p, int rounds, unsigned char* memory)
      : p(p),
        rounds(rounds),
        shared(*reinterpret_cast<Shared*>(memory)),
        blocks(cluster_blocks()),
        rank(cluster_rank()),
        first(reinterpret_cast<First*>(memory + p.slices_end)),
        second(reinterpret_cast<Sums*>(first + RECORDS * blocks)) {}

  FUSED_KD_DEVICE bool goes_on(uint32_t rank, int round) const {
    return rank == 0 || all_go_on(p, round, rounds);
  }

  // Initialises the barriers; called by the first thread before it arrives.
  FUSED_KD_DEVICE void prepare() const {
    if (blocks == 1) return;
    for (int round = 1; round <= rounds; ++round) barrier_init(&shared.handed[round - 1]);
    barrier_init_fence();
    for (int round = 1; round <= rounds; ++round) {
      const uint32_t bytes = round == 1 ? RECORDS * sizeof(First) : sizeof(Sums);
      if (goes_on(rank, round)) barrier_expect(&shared.handed[round - 1], blocks * bytes);
    }
  }

  // Called by all threads after the barriers of this block are initialised.
  FUSED_KD_DEVICE void arrive() const {
    if (blocks > 1) cluster_arrive();
  }

  template <class Merge>
  FUSED_KD_DEVICE bool operator()(Record (&record)[RECORDS], int round, Merge merge) const {
    if (blocks == 1) return true;
    if (round == 1) cluster_wait();  // until the barriers of all blocks are initialised
    if (threadIdx.x < 32) {
      const uint32_t lane = threadIdx.x;
      if (lane < blocks && goes_on(lane, round)) hand_over(record, round, lane);
      if (goes_on(rank, round)) {
        barrier_wait_for_peers(&shared.handed[round - 1], 0);
        if (round == 1) {
#pragma unroll
          for (int i = 0; i < RECORDS; ++i)
            record[i] = lane < blocks ? unpack(first[i * blocks + lane]) : empty_record();
        } else {
          set_second(record[0], lane < blocks ? second[lane] : Sums{});
        }
        merge(record);
      }
    }
    return goes_on(rank, round);
  }

  FUSED_KD_DEVICE void hand_over(const Record (&record)[RECORDS], int round, uint32_t peer) const {
    struct Halves {
      Bits16 low, high;
    };
    uint64_t* barrier = &shared.handed[round - 1];
    if (round == 1) {
#pragma unroll
      for (int i = 0; i < RECORDS; ++i) {
        const Halves halves = same_bits<Halves>(pack(record[i]));
        First* to = first + i * blocks + rank;
        push(to, halves.low, barrier, peer);
        push(reinterpret_cast<unsigned char*>(to) + 16, halves.high, barrier, peer);
      }
    } else {
      const Sums sums = {record[0].r.x, record[0].r.y};
      push(second + rank, same_bits<Bits8>(sums), barrier, peer);
    }
  }
};

#endif

// Computes losses and statistics of a row, and its gradient if there is one.
template <Divergence D, Dtype S, class Source, class Exchange>
FUSED_KD_DEVICE void process_row(const Params& p, const Row& row, const Source& source, int part,
                                 Shared& shared, Exchange exchange) {
  const Options& o = p.options;
  Record records[1] = {first_pass<D>(source, o)};
  Record& record = records[0];
  // read before the exchange, after which, in place, another block may overwrite it
  if (threadIdx.x == 0) shared.s_label = row.s_label;
  record = merge_block<D>(record, o, shared);
  const auto merge = [&](Record(&r)[1]) { merge_warp<D>(r[0], o); };
  if (!exchange(records, 1, merge)) return;
  if constexpr (Rule<D>::TWO_PASSES) {
    const Second<D> second = broadcast_from_first<Second<D>>(p, row, record, shared);
    second_pass<D>(source, o, second, record.r.x, record.r.y);
    record = merge_second_block(record, shared);
    if (!exchange(records, 2, [](Record(&r)[1]) { merge_second_warp(r[0]); })) return;
  }
  if (part == 0 && threadIdx.x == 0) write_losses<D>(p, row, shared.s_label, record);
  if (p.grad.data != nullptr)
    gradient_pass<D, S>(p, row, source, broadcast_from_first<Gradient<D>>(p, row, record, shared));
}

// Writes the zeros of a row that is off; nothing is read.
template <Dtype S, class Source>
FUSED_KD_DEVICE void skip_row(const Params& p, const Row& row, const Source& source, int part) {
  if (p.grad.data != nullptr) zero_gradient<S>(p, row, source);
  if (part != 0 || threadIdx.x != 0) return;
  p.hard[row.n] = p.soft[row.n] = 0.0f;
  reinterpret_cast<Record*>(p.stats)[row.n] = empty_record();
}

// Computes gradients from an earlier launch's statistics. Blocks do not wait for each other, so a
// few stride over all rows. They return at once if there is nothing to do.
template <Divergence D, Dtype S, bool SAME>
FUSED_KD_DEVICE void gradients_from_statistics(const Params& p) {
  if (p.unless_exact && is_exact(*p.scale)) return;
  for (uint32_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const int part = static_cast<int>(unit % p.parts);
    Row row(p, p.first_row + unit / p.parts);
    const GlobalRow<D, S, SAME> source(p, row, part);
    if (!row.hard && !row.soft) {
      zero_gradient<S>(p, row, source);
      continue;
    }
    row.read_label(p, false);
    const Record& record = reinterpret_cast<const Record*>(p.stats)[row.n];
    gradient_pass<D, S>(p, row, source, Gradient<D>(p, row, record));
  }
}

// Returns the number of this block's unit in the launch.
FUSED_KD_DEVICE uint32_t take_unit(const Params& p, Shared& shared) {
  if (p.parts == 1) return blockIdx.x;
  if (threadIdx.x == 0) shared.ticket = take_ticket(p.tickets);
  block_sync();
  return shared.ticket - static_cast<uint32_t>(p.first_row * p.parts);
}

// Any number of blocks per row, which exchange records in global memory. Grid: p.units, or less
// from statistics. Budget: 128 registers, the head of shared memory.
template <Divergence D, Dtype S, bool SAME>
__global__ void __launch_bounds__(THREADS, GENERAL_BLOCKS)
    rows_general(const __grid_constant__ Params p) {
  if (p.from_stats) return gradients_from_statistics<D, S, SAME>(p);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const uint32_t number = take_unit(p, shared);
  const int64_t n = p.first_row + number / p.parts;
  const int part = static_cast<int>(number % p.parts);
  Row row(p, n);
  const GlobalRow<D, S, SAME> source(p, row, part);
  const GlobalExchange<1> exchange{p, n, part, Rule<D>::TWO_PASSES ? 2 : 1, shared};
  if (!row.hard && !row.soft) {
    exchange.skip();
    return skip_row<S>(p, row, source, part);
  }
  if (threadIdx.x == 0) row.read_label(p, part == 0);
  process_row<D, S>(p, row, source, part, shared, exchange);
}

// A cluster of p.parts blocks per row, each with its slice of both sides in shared memory. Budget:
// 80 registers (128 if BOUND_BY_ARITHMETIC: jsd), a third of a multiprocessor's shared memory.
template <Divergence D, Dtype S, bool SAME>
__global__ void __launch_bounds__(THREADS, Rule<D>::BOUND_BY_ARITHMETIC ? 2 : 3)
    rows_cluster(const __grid_constant__ Params p) {
#ifdef FUSED_KD_HAS_CLUSTERS
  unsigned char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t n = p.first_row + (blockIdx.x >> p.parts_log2);
  const int part = static_cast<int>(cluster_rank());
  Row row(p, n);
  const SharedRow<D, S, SAME> source(p, row, part, memory + sizeof(Shared), shared.barriers);
  if (!row.hard && !row.soft) return skip_row<S>(p, row, source, part);
  source.load();
  const ClusterExchange<1> exchange(p, Rule<D>::TWO_PASSES ? 2 : 1, memory);
  if (threadIdx.x == 0) {
    exchange.prepare();
    row.read_label(p, part == 0);
  }
  block_sync();
  exchange.arrive();
  process_row<D, S>(p, row, source, part, shared, exchange);
#elif defined(__CUDA_ARCH__)
  __trap();  // launch.cu never selects it for these devices
#endif
}

// Multiplies a gradient by p.scale; entries of 0 stay 0 for any scale. Any grid: blocks stride over
// p.units, and return at once if there is nothing to do. Budget: 40 registers.
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
