// Runs CUDA kernels on the CPU, for tests: see README.md. A kernel's source is compiled as C++ with
// this header in the place of csrc/cuda/primitives.cuh, and means the same.
#pragma once

#include "numbers.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__

// Kernels' own types contain these: as visible as those are.
namespace fused_kd {

struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bits8 {
  uint32_t x, y;
};

struct LaunchShape {
  int64_t grid;
  int block;
  int shared_bytes;
  int cluster;    // blocks in one; 1: none
  int waits_for;  // blocks that wait for each other through wait_until; 1: none
};

}  // namespace fused_kd

#pragma GCC visibility push(hidden)

// The order of everything that follows, until the next call. FUSED_KD_EMULATOR_SEED sets the first.
extern "C" __attribute__((used, visibility("default"))) inline void emulator_seed(uint64_t seed) {
  fused_kd::emulator::machine.set_seed(seed);
}

namespace fused_kd {

using emulator::Place;

namespace emulator {

inline void must_be_aligned(const void* p, unsigned bytes, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  machine.die(machine.current, place, "%s: %p is not a multiple of %u", what, p, bytes);
}

// Other threads may run here, as they may anywhere on a GPU.
inline void chance(unsigned one_in_n, Place place) {
  if (machine.one_in(one_in_n)) machine.wait(State::ready, place);
}

inline uint32_t add_one(uint32_t* counter) { return (*counter)++; }
inline void mark(uint64_t* barrier, uint64_t value) { *barrier = value; }
inline uint64_t marked(const uint64_t* barrier) { return *barrier; }
constexpr uint64_t MARK = 0xfff7ba881e5fff7b;  // NaN, read as a number

inline Mbarrier& checked(Block& block, uint64_t* barrier, Place place) {
  Mbarrier& mbarrier = machine.mbarrier(block, barrier, place);
  if (marked(barrier) != MARK) machine.die(machine.current, place, "an mbarrier was overwritten");
  return mbarrier;
}

}  // namespace emulator

namespace emulator {

inline void about_to_load16(const void* p, const char* what, Place place) {
  Inside inside;
  must_be_aligned(p, 16, what, place);
  chance(32, place);
}

EMULATOR_UNSEEN inline Bits16 copy_unseen(const void* p) {
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

}  // namespace emulator

inline Bits16 load16(const void* p, Place place = Place::current()) {
  emulator::about_to_load16(p, "load16", place);
  Bits16 bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

// Hidden from ThreadSanitizer: other threads may write what the caller discards.
inline Bits16 load16_in_part(const void* p, Place place = Place::current()) {
  emulator::about_to_load16(p, "load16_in_part", place);
  return emulator::copy_unseen(p);
}

inline void store16(void* p, Bits16 bits, Place place = Place::current()) {
  {
    using namespace emulator;
    Inside inside;
    must_be_aligned(p, 16, "store16", place);
    if (machine.in_live_shared_memory(p))
      machine.die(machine.current, place, "store16 is for global memory");
    chance(32, place);
  }
  memcpy(p, &bits, sizeof bits);
}

namespace emulator {

// The value of lane `source` of this warp; `kind` is the same in all lanes that take part.
inline uint32_t exchange(uint32_t value, unsigned source, int kind, Place place) {
  Fiber& me = *machine.current;
  me.value = value;
  me.source = me.thread / WARP * WARP + source;
  me.kind = kind;
  machine.meet(me.block->warps[me.thread / WARP], State::shuffle, place);
  me.kind = 0;
  return me.received;
}

}  // namespace emulator

inline float shuffle_xor(float v, int mask, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  const Fiber& me = *machine.current;
  if (mask < 0 || mask >= int(WARP)) machine.die(&me, place, "shuffle_xor: mask %d", mask);
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  bits = exchange(bits, me.thread % WARP ^ unsigned(mask), mask, place);
  memcpy(&v, &bits, sizeof v);
  return v;
}

inline uint32_t shuffle(uint32_t v, int lane, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  if (lane < 0 || lane >= int(WARP)) machine.die(machine.current, place, "shuffle: lane %d", lane);
  return exchange(v, unsigned(lane), ANY_LANE, place);
}

inline float warp_max(float v, Place place = Place::current()) {
  for (int mask = int(emulator::WARP) / 2; mask > 0; mask /= 2)
    v = fmaxf(v, shuffle_xor(v, mask, place));
  return v;
}

inline bool warp_any(bool v, Place place = Place::current()) {
  return warp_max(v ? 1.0f : 0.0f, place) > 0.0f;
}

inline void warp_sync(Place place = Place::current()) {
  emulator::Inside inside;
  emulator::exchange(0, 0, emulator::WARP_SYNC, place);
}

inline void block_sync(Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  machine.meet(machine.current->block->meeting, State::block_sync, place);
}

inline void set_bits(uint32_t* word, uint32_t bits, Place place = Place::current()) {
  {
    emulator::Inside inside;
    emulator::must_be_aligned(word, 4, "set_bits", place);
    emulator::chance(4, place);
  }
  __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);  // seen by ThreadSanitizer, against plain reads
}

inline uint32_t take_ticket(uint32_t* counter, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  must_be_aligned(counter, 4, "take_ticket", place);
  chance(2, place);
  const uint32_t ticket = add_one(counter);
  machine.wake(counter);
  chance(2, place);
  return ticket;
}

inline void arrive(uint32_t* counter, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  must_be_aligned(counter, 4, "arrive", place);
  chance(2, place);
  release(machine.clock(counter));
  add_one(counter);
  machine.wake(counter);
  chance(2, place);
}

inline void wait_until(const uint32_t* counter, uint32_t target, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  must_be_aligned(counter, 4, "wait_until", place);
  chance(2, place);
  while (read_counter(counter) < target) {
    machine.wait_for(State::counter, counter, target, place);
  }
  acquire(machine.clock(counter));
}

inline uint32_t cluster_blocks() {
  emulator::Inside inside;
  return uint32_t(emulator::machine.current->block->cluster->blocks.size());
}

inline uint32_t cluster_rank() {
  emulator::Inside inside;
  return emulator::machine.current->block->index %
         uint32_t(emulator::machine.current->block->cluster->blocks.size());
}

inline void cluster_arrive(Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  chance(4, place);
  machine.arrive_at_cluster(place);
}

inline void cluster_wait(Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  chance(4, place);
  machine.wait_for_cluster(place);
}

inline unsigned char* dynamic_shared() {
  emulator::Inside inside;
  return emulator::machine.current->block->shared;
}

inline void barrier_init(uint64_t* barrier, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  Block& block = *machine.current->block;
  must_be_aligned(barrier, 8, "barrier_init", place);
  if (!block.owns(barrier, 8)) {
    machine.die(machine.current, place, "barrier_init: not in this block's shared memory");
  }
  if (block.mbarriers.count(barrier))
    machine.die(machine.current, place, "barrier_init: a second time");
  block.mbarriers[barrier].init_thread = machine.current->thread;
  mark(barrier, MARK);
}

inline void barrier_init_fence() {
  using namespace emulator;
  Inside inside;
  for (auto& [address, mbarrier] : machine.current->block->mbarriers) {
    if (mbarrier.init_thread == machine.current->thread) mbarrier.fenced = true;
  }
}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  chance(4, place);
  Mbarrier& mbarrier = checked(*machine.current->block, barrier, place);
  if (mbarrier.arrived)
    machine.die(machine.current, place, "barrier_expect: a second time in one phase");
  if (mbarrier.issued > bytes) {
    machine.die(machine.current, place, "barrier_expect: %u bytes, but copies of %llu were issued",
                bytes, (unsigned long long)mbarrier.issued);
  }
  mbarrier.arrived = true;
  mbarrier.expected = bytes;
  release(mbarrier.landing_clock);
  machine.advance(mbarrier, barrier);
}

namespace emulator {

// Bytes on their way into a block's shared memory, which its barrier counts when they land.
inline void send(const char* what, const Copy& copy, uint64_t* barrier, Place place) {
  const Fiber* me = machine.current;
  Block& block = *copy.block;
  if (!block.owns(copy.to, copy.bytes))
    machine.die(me, place, "%s: %u bytes to outside of the block's shared memory", what,
                copy.bytes);
  for (const auto& [address, other] : block.mbarriers) {
    const auto* word = static_cast<const unsigned char*>(address);
    if (word + 8 > copy.to && word < copy.to + copy.bytes)
      machine.die(me, place, "%s: over an mbarrier", what);
  }
  for (const Copy& other : machine.copies) {
    if (other.to + other.bytes <= copy.to || other.to >= copy.to + copy.bytes) continue;
    machine.die(me, place, "%s: another is still under way to the same memory", what);
  }
  Mbarrier& mbarrier = checked(block, barrier, place);
  mbarrier.issued += copy.bytes;
  if (mbarrier.arrived && mbarrier.issued > mbarrier.expected) {
    machine.die(me, place, "%s: %llu bytes issued in a phase that expects %llu", what,
                (unsigned long long)mbarrier.issued, (unsigned long long)mbarrier.expected);
  }
  release(mbarrier.issue_clock);
  // What was there is undefined: the copy may have begun.
  memset(copy.to, 0xff, copy.bytes);
  poison(copy.to, copy.bytes);
  machine.copies.push_back(copy);
  machine.copies.back().mbarrier = &mbarrier;
  machine.copies.back().address = barrier;
}

}  // namespace emulator

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                      Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  const Fiber* me = machine.current;
  chance(4, place);
  must_be_aligned(shared, 16, "bulk_copy to", place);
  must_be_aligned(global, 16, "bulk_copy from", place);
  if (bytes == 0 || bytes % 16) machine.die(me, place, "bulk_copy: %u bytes", bytes);
  if (machine.in_live_shared_memory(global))
    machine.die(me, place, "bulk_copy: from shared memory");
  if (!readable(global, bytes)) machine.die(me, place, "bulk_copy: %u bytes cannot be read", bytes);
  send("bulk_copy", {static_cast<unsigned char*>(shared), global, bytes, me->block}, barrier,
       place);
  chance(2, place);
}

template <class Bits>
void push(void* shared, Bits bits, uint64_t* barrier, uint32_t rank,
          Place place = Place::current()) {
  using namespace emulator;
  static_assert(sizeof bits <= sizeof Copy::pushed);
  Inside inside;
  const Fiber* me = machine.current;
  chance(4, place);
  must_be_aligned(shared, sizeof bits, "push", place);
  const auto& blocks = me->block->cluster->blocks;
  if (rank >= blocks.size()) machine.die(me, place, "push: no block of rank %u", rank);
  Block& peer = *blocks[rank];
  if (peer.ended) machine.die(me, place, "push: block %u has ended", rank);
  const auto there = [&](void* p) {
    return peer.shared + (static_cast<unsigned char*>(p) - me->block->shared);
  };
  Copy copy = {there(shared), nullptr, sizeof bits, &peer};
  memcpy(copy.pushed, &bits, sizeof bits);
  send("push", copy, reinterpret_cast<uint64_t*>(there(barrier)), place);
  chance(2, place);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity, Place place = Place::current()) {
  using namespace emulator;
  Inside inside;
  chance(4, place);
  Mbarrier& mbarrier = checked(*machine.current->block, barrier, place);
  if (parity > 1) machine.die(machine.current, place, "barrier_wait: parity %u", parity);
  if (mbarrier.phase == 0 && parity == 1) {
    machine.die(machine.current, place, "barrier_wait: no phase of parity 1 has been yet");
  }
  while (mbarrier.phase % 2 == parity) {
    machine.wait_for(State::phase, barrier, parity, place);
  }
  acquire(mbarrier.landing_clock);
}

inline void barrier_wait_for_peers(uint64_t* barrier, uint32_t parity,
                                   Place place = Place::current()) {
  barrier_wait(barrier, parity, place);
}

// 0, or what cudaErrorInvalidConfiguration is, with the reason on stderr.
template <class Params>
int launch_kernel(void (*kernel)(Params), const LaunchShape& shape, void* stream,
                  const Params& params) {
  using namespace emulator;
  const bool valid = shape.grid > 0 && shape.grid <= INT32_MAX && shape.block > 0 &&
                     shape.block <= 1024 && shape.block % int(WARP) == 0 &&
                     shape.shared_bytes >= 0 && shape.shared_bytes <= 227 * 1024 &&
                     shape.cluster >= 1 && shape.cluster <= 16 && shape.grid % shape.cluster == 0 &&
                     shape.waits_for >= 1;
  if (!valid) {
    fprintf(
        stderr,
        "cuda_on_cpu: invalid launch: grid %lld, block %d, shared %d, cluster %d, waits for %d\n",
        (long long)shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.waits_for);
    return 9;
  }
  machine.kernel.function = reinterpret_cast<void (*)()>(kernel);
  machine.kernel.call = [](void (*function)(), const void* arguments) {
    reinterpret_cast<void (*)(Params)>(function)(*static_cast<const Params*>(arguments));
  };
  machine.kernel.params = &params;
  machine.kernel.type = __PRETTY_FUNCTION__;
  machine.launch(shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.waits_for);
  return 0;
}

inline int clear_memory(void* p, int64_t bytes, void* stream) {
  memset(p, 0, size_t(bytes));
  return 0;
}

}  // namespace fused_kd

#pragma GCC visibility pop
