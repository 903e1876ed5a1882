// How threads, blocks and clusters begin and end, and what must be in order by then.
#pragma once

#include "machine.h"

#pragma GCC visibility push(hidden)

namespace fused_kd::emulator {

inline void Machine::fiber_main() {
  {
    Inside inside;
    arrived(machine.current->flow);
  }
  for (;;) {
    {
      Inside inside;
      acquire(machine.current->block->start_clock);
    }
    machine.kernel.call(machine.kernel.function, machine.kernel.params);
    Inside inside;
    Fiber& me = *machine.current;
    release(me.block->end_clock);
    me.state = State::done;
    switch_flow(me.flow, machine.scheduler);
  }
}

inline void Machine::start_cluster() {
  const unsigned low = std::max(waits_for_, cluster_size_);
  live_target_ = low + unsigned(random() % (std::max(low, MOST_LIVE_BLOCKS) - low + 1));
  const unsigned first = to_start_.back();
  to_start_.pop_back();
  live_.push_back(std::make_unique<Cluster>());
  live_.back()->size = cluster_size_ * threads_;
  for (unsigned i = 0; i < cluster_size_; ++i) start_block(*live_.back(), first + i);
}

inline void Machine::start_block(Cluster& cluster, unsigned index) {
  cluster.blocks.push_back(std::make_unique<Block>());
  Block& block = *cluster.blocks.back();
  block.cluster = &cluster;
  block.index = index;
  block.shared_bytes = shared_bytes_;
  const size_t size = (GUARD_BYTES + shared_bytes_ + GUARD_BYTES + 127) / 128 * 128;
  block.allocation = static_cast<unsigned char*>(aligned_alloc(128, size));
  block.allocated = size;
  block.shared = block.allocation + GUARD_BYTES;
  memset(block.allocation, 0xff, size);
  poison(block.allocation, GUARD_BYTES);
  poison(block.shared + shared_bytes_, size - GUARD_BYTES - shared_bytes_);
  block.meeting.size = threads_;
  block.warps.resize(threads_ / WARP);
  for (unsigned thread = 0; thread < threads_; ++thread) {
    block.warps[thread / WARP].size = WARP;
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>());  // kept for later launches
      idle_.push_back(fibers_.back().get());
      create_flow(idle_.back()->flow, fiber_main);
      idle_.back()->flow.identity = new_identity();
    }
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    fiber->block = &block;
    fiber->thread = thread;
    fiber->place = {"", 0};
    block.fibers.push_back(fiber);
    make_ready(fiber);
  }
}

inline void Machine::end_fiber(Fiber& fiber) {
  Block& block = *fiber.block;
  if (fiber.arrived) die(&fiber, {}, "a thread ends between cluster_arrive and cluster_wait");
  for (const Fiber* waiting : block.cluster->waiting)
    die(waiting, waiting->place, "cluster_wait waits for thread %u of block %u, which has ended",
        fiber.thread, block.index);
  ++block.cluster->ended;
  for (Meeting* meeting : {&block.warps[fiber.thread / WARP], &block.meeting}) {
    ++meeting->ended;
    if (meeting->waiting.empty()) continue;
    const Fiber& waiting = *meeting->waiting.front();
    die(&waiting, waiting.place, "%s waits for thread %u of block %u, which has ended",
        STATE_NAMES[int(waiting.state)], fiber.thread, block.index);
  }
  idle_.push_back(&fiber);
  if (block.meeting.ended == block.meeting.size) end_block(fiber);
}

inline bool all_ff(const unsigned char* p, size_t bytes) {
  return std::all_of(p, p + bytes, [](unsigned char byte) { return byte == 0xff; });
}

inline void Machine::end_block(const Fiber& last) {
  Block& block = *last.block;
  acquire(block.end_clock);
  for (const Copy& copy : copies) {
    if (copy.block == &block) die(&last, {}, "the block ends before a copy into it has landed");
  }
  for (const auto& [address, mbarrier] : block.mbarriers) {
    if (!mbarrier.arrived && mbarrier.issued == 0) continue;
    die(&last, {}, "the block ends and the mbarrier at byte %zu expects %llu bytes, %llu came",
        size_t((const unsigned char*)address - block.shared), (unsigned long long)mbarrier.expected,
        (unsigned long long)mbarrier.issued);
  }
  unsigned char* end = block.shared + block.shared_bytes;
  unpoison(block.allocation, block.allocated);
  if (!all_ff(block.allocation, GUARD_BYTES)) die(&last, {}, "written before shared memory");
  if (!all_ff(end, GUARD_BYTES)) die(&last, {}, "written past the end of shared memory");
  block.ended = true;
  Cluster& cluster = *block.cluster;
  if (cluster.ended == cluster.size) end_cluster(cluster);
}

inline void Machine::end_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) free(block->allocation);
  const auto mine = [&](const std::unique_ptr<Cluster>& other) { return other.get() == &cluster; };
  live_.erase(std::find_if(live_.begin(), live_.end(), mine));
}

}  // namespace fused_kd::emulator

#pragma GCC visibility pop
