// Which thread runs next, what threads wait for, and what lets them go on.
#pragma once

#include "machine.h"

#pragma GCC visibility push(hidden)

namespace fused_kd::emulator {

inline uint64_t Machine::random() {  // splitmix64
  uint64_t z = random_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline void Machine::launch(int64_t grid, int block, int shared_bytes, int cluster, int waits_for) {
  ++launches_;
  threads_ = unsigned(block);
  shared_bytes_ = size_t(shared_bytes);
  cluster_size_ = unsigned(cluster);
  waits_for_ = unsigned(waits_for);
  blockDim.x = threads_;
  gridDim.x = unsigned(grid);
  order_left_ = 0;
  if (!scheduler.identity) scheduler.identity = own_identity();
  for (unsigned first = 0; first < gridDim.x; first += cluster_size_) to_start_.push_back(first);
  for (size_t i = to_start_.size(); i > 1; --i)
    std::swap(to_start_[i - 1], to_start_[random() % i]);
  run();
}

inline void Machine::run() {
  live_target_ = 0;
  for (;;) {
    while (!to_start_.empty() && (live_.empty() || live_.size() * cluster_size_ < live_target_)) {
      start_cluster();
    }
    if (live_.empty()) return;
    if (order_left_ == 0) redraw_order();
    --order_left_;
    const bool copy_now = ready_.empty() || (copy_delay_ && one_in(copy_delay_));
    if (copy_now && !copies.empty()) {
      finish_copy();
    } else if (!ready_.empty()) {
      resume(pick());
    } else if (!wake_satisfied()) {
      stuck();
    }
  }
}

// The order is uniformly random for a while, then such that a few threads run as far as they can,
// then such that they advance together; each finds other mistakes. Half of the time one thread is
// kept back for as long as there are others: what it should have read first is then overwritten.
inline void Machine::redraw_order() {
  order_left_ = 1u << random() % 12;
  order_ = unsigned(random() % 3);
  copy_delay_ = one_in(2) ? 0 : unsigned(random() % 16) + 2;
  kept_back_ = one_in(2) || ready_.empty() ? nullptr : ready_[random() % ready_.size()];
}

inline Fiber* Machine::pick() {
  const size_t count = ready_.size();
  size_t i = order_ == 0 ? random() % count : order_ == 1 ? count - 1 : 0;
  if (ready_[i] == kept_back_) i = (i + 1) % count;
  Fiber* fiber = ready_[i];
  ready_[i] = ready_.back();
  ready_.pop_back();
  return fiber;
}

EMULATOR_UNSEEN inline void set_indices(unsigned thread, unsigned block) {
  threadIdx.x = thread;
  blockIdx.x = block;
}

inline void Machine::resume(Fiber* fiber) {
  Block& block = *fiber->block;
  if (!block.started) {
    block.started = true;
    release(block.start_clock);
  }
  current = fiber;
  set_indices(fiber->thread, block.index);
  switch_flow(scheduler, fiber->flow);
  if (fiber->state == State::done) end_fiber(*fiber);
}

inline void Machine::wait(State state, Place place) {
  Fiber& me = *current;
  me.state = state;
  me.place = place;
  if (state == State::ready) ready_.push_back(&me);
  switch_flow(me.flow, scheduler);
}

inline void Machine::meet(Meeting& meeting, State state, Place place) {
  Fiber& me = *current;
  const char* name = STATE_NAMES[int(state)];
  if (meeting.ended) die(&me, place, "%s, but %u threads have ended", name, meeting.ended);
  if (!meeting.waiting.empty()) {
    const Fiber& other = *meeting.waiting.front();
    if (other.place.line != place.line || other.kind != me.kind) {
      die(&me, place, "%s, but thread %u of block %u waits in another: %s:%d", name, other.thread,
          other.block->index, other.place.file, other.place.line);
    }
  }
  char& clock = meeting.clocks[meeting.opened % 2];
  const bool orders_memory = state != State::shuffle || me.kind == WARP_SYNC;
  if (orders_memory) release(clock);
  meeting.waiting.push_back(&me);
  if (meeting.waiting.size() < meeting.size) {
    wait(state, place);
  } else {
    ++meeting.opened;
    for (Fiber* fiber : meeting.waiting) {
      if (state == State::shuffle) fiber->received = fiber->block->fibers[fiber->source]->value;
      if (fiber != &me) make_ready(fiber);
    }
    meeting.waiting.clear();
    wait(State::ready, place);
  }
  if (orders_memory) acquire(clock);
}

// It orders no memory.
inline void Machine::arrive_at_cluster(Place place) {
  Fiber& me = *current;
  Cluster& cluster = *me.block->cluster;
  if (me.arrived) die(&me, place, "cluster_arrive: a second time before cluster_wait");
  if (cluster.ended) die(&me, place, "cluster_arrive, but %u threads have ended", cluster.ended);
  if (cluster.arrivals && cluster.place.line != place.line)
    die(&me, place, "cluster_arrive, but others have arrived at another: %s:%d", cluster.place.file,
        cluster.place.line);
  cluster.place = place;
  me.arrived = true;
  me.phase = cluster.phase;
  if (++cluster.arrivals < cluster.size) return;
  cluster.arrivals = 0;
  ++cluster.phase;
  for (Fiber* fiber : cluster.waiting) make_ready(fiber);
  cluster.waiting.clear();
}

inline void Machine::wait_for_cluster(Place place) {
  Fiber& me = *current;
  Cluster& cluster = *me.block->cluster;
  if (!me.arrived) die(&me, place, "cluster_wait without cluster_arrive");
  if (cluster.phase == me.phase) {
    if (cluster.ended) die(&me, place, "cluster_wait, but %u threads have ended", cluster.ended);
    cluster.waiting.push_back(&me);
    wait(State::cluster_wait, place);
  }
  me.arrived = false;
}

inline void Machine::wait_for(State state, const void* address, uint32_t target, Place place) {
  current->address = address;
  current->target = target;
  parked_.push_back(current);
  wait(state, place);
}

inline void Machine::wake(const void* address) {
  for (size_t i = parked_.size(); i-- > 0;) {
    if (parked_[i]->address != address) continue;
    make_ready(parked_[i]);
    parked_[i] = parked_.back();
    parked_.pop_back();
  }
}

EMULATOR_UNSEEN inline uint32_t read_counter(const void* counter) {
  return *static_cast<const volatile uint32_t*>(counter);
}

// A counter may also have been set by a plain store.
inline bool Machine::wake_satisfied() {
  for (const Fiber* fiber : parked_) {
    if (fiber->state != State::counter || read_counter(fiber->address) < fiber->target) continue;
    wake(fiber->address);
    return true;
  }
  return false;
}

inline Mbarrier& Machine::mbarrier(Block& block, const void* address, Place place) {
  const auto entry = block.mbarriers.find(address);
  if (entry == block.mbarriers.end()) die(current, place, "an mbarrier used before barrier_init");
  if (!entry->second.fenced) die(current, place, "an mbarrier used before barrier_init_fence");
  return entry->second;
}

// Completes the phase if all has come that it waits for.
inline void Machine::advance(Mbarrier& mbarrier, const void* address) {
  if (!mbarrier.arrived || mbarrier.landed != mbarrier.expected) return;
  ++mbarrier.phase;
  mbarrier.arrived = false;
  mbarrier.expected = mbarrier.issued = mbarrier.landed = 0;
  wake(address);
}

inline void Machine::finish_copy() {
  const size_t i = random() % copies.size();
  const Copy copy = copies[i];
  copies[i] = copies.back();
  copies.pop_back();
  acquire(copy.mbarrier->issue_clock);
  unpoison(copy.to, copy.bytes);
  memcpy(copy.to, copy.from ? copy.from : copy.pushed, copy.bytes);
  release(copy.mbarrier->landing_clock);
  copy.mbarrier->landed += copy.bytes;
  advance(*copy.mbarrier, copy.address);
}

inline bool Machine::in_live_shared_memory(const void* p) const {
  for (const auto& cluster : live_) {
    for (const auto& block : cluster->blocks) {
      if (block->owns(p)) return true;
    }
  }
  return false;
}

}  // namespace fused_kd::emulator

#pragma GCC visibility pop
