// The emulated machine: blocks of fibers, one per thread, and the scheduler that runs them in an
// order drawn from a seed. A fiber's waits and faults are determined here.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>

#include "fibers.h"

#pragma GCC visibility push(hidden)

struct EmulatorIndex {
  unsigned x;
};
inline EmulatorIndex threadIdx, blockIdx, blockDim, gridDim;

namespace fused_kd::emulator {

constexpr unsigned WARP = 32, MOST_LIVE_BLOCKS = 8;
constexpr int ANY_LANE = 32, WARP_SYNC = 33;  // kinds of shuffles, besides the masks of shuffle_xor
constexpr size_t GUARD_BYTES = 256;

// A line of the kernel: the default argument of every primitive is its caller's.
struct Place {
  const char* file;
  int line;
  static constexpr Place current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class State { ready, shuffle, block_sync, cluster_wait, phase, counter, done };
constexpr const char* STATE_NAMES[] = {"ready",        "shuffle_xor", "block_sync", "cluster_wait",
                                       "barrier_wait", "wait_until",  "ended"};

// An mbarrier. The 64 bits in shared memory only hold a mark: overwriting it is detected.
struct Mbarrier {
  unsigned init_thread = 0;
  bool fenced = false, arrived = false;  // arrived: barrier_expect was called in this phase
  uint32_t phase = 0;                    // phases completed so far
  uint64_t expected = 0, issued = 0, landed = 0;  // bytes of this phase
  char issue_clock = 0, landing_clock = 0;        // addresses for ThreadSanitizer
};

struct Block;

struct Fiber {
  Flow flow;
  Block* block = nullptr;
  unsigned thread = 0;
  State state = State::done;
  Place place = {"", 0};
  uint32_t value = 0, received = 0;  // of a shuffle
  unsigned source = 0;               // the thread whose value it gets
  int kind = 0;                      // of the shuffle: a mask, ANY_LANE or WARP_SYNC
  const void* address = nullptr;     // the mbarrier or the counter
  uint32_t target = 0;               // parity or count
  bool arrived = false;              // at a cluster's barrier, without having waited there yet
  unsigned phase = 0;                // of that barrier
};

// A barrier of all threads of a warp or a block.
struct Meeting {
  std::vector<Fiber*> waiting;
  unsigned size = 0, ended = 0, opened = 0;
  char clocks[2] = {};  // addresses for ThreadSanitizer: this barrier's, and the next one's
};

// All threads of its blocks share a barrier with separate calls to arrive and to wait.
struct Cluster {
  std::vector<Fiber*> waiting;
  Place place = {"", 0};                                  // of those that have arrived
  unsigned size = 0, ended = 0, arrivals = 0, phase = 0;  // threads
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  Cluster* cluster = nullptr;
  unsigned index = 0;
  bool started = false, ended = false;
  char start_clock = 0, end_clock = 0;
  std::vector<Fiber*> fibers;
  std::vector<Meeting> warps;
  Meeting meeting;
  std::map<const void*, Mbarrier> mbarriers;
  unsigned char *allocation = nullptr, *shared = nullptr;
  size_t shared_bytes = 0, allocated = 0;

  bool owns(const void* p, size_t bytes = 1) const {
    const auto address = reinterpret_cast<uintptr_t>(p),
               first = reinterpret_cast<uintptr_t>(shared);
    return address >= first && bytes <= shared_bytes && address - first <= shared_bytes - bytes;
  }
};

// What is under way into shared memory.
struct Copy {
  unsigned char* to;
  const void* from;  // null: `pushed`
  uint32_t bytes;
  Block* block;  // whose memory it is
  Mbarrier* mbarrier = nullptr;
  const void* address = nullptr;  // the mbarrier's, in shared memory
  unsigned char pushed[16] = {};
};

class Machine {
 public:
  Machine() {
    const char* seed = getenv("FUSED_KD_EMULATOR_SEED");
    set_seed(seed ? strtoull(seed, nullptr, 0) : 0);
  }
  void set_seed(uint64_t seed) { seed_ = random_ = seed, launches_ = 0; }
  void launch(int64_t grid, int block, int shared_bytes, int cluster, int waits_for);

  // For the primitives, which run in a fiber.
  bool one_in(unsigned n) { return random() % n == 0; }
  void wait(State state, Place place);
  void meet(Meeting& meeting, State state, Place place);
  void arrive_at_cluster(Place place);
  void wait_for_cluster(Place place);
  void wait_for(State state, const void* address, uint32_t target, Place place);
  void wake(const void* address);
  Mbarrier& mbarrier(Block& block, const void* address, Place place);
  void advance(Mbarrier& mbarrier, const void* address);
  bool in_live_shared_memory(const void* p) const;
  char& clock(const void* counter) { return clocks_[counter]; }
  // A message that names the kernel, the fiber's block and thread, and the place; then abort().
  [[noreturn]] __attribute__((format(printf, 4, 5))) void die(const Fiber* fiber, Place place,
                                                              const char* format, ...);

  Fiber* current = nullptr;
  Flow scheduler;
  std::vector<Copy> copies;
  struct {  // what is being run, its type forgotten
    void (*function)();
    void (*call)(void (*)(), const void*);
    const void* params;
    const char* type;
  } kernel = {};

 private:
  static void fiber_main();
  uint64_t random();
  void run();
  void resume(Fiber* fiber);
  void start_cluster();
  void start_block(Cluster& cluster, unsigned index);
  void end_fiber(Fiber& fiber);
  void end_block(const Fiber& last);
  void end_cluster(Cluster& cluster);
  void redraw_order();
  Fiber* pick();
  void finish_copy();
  bool wake_satisfied();
  [[noreturn]] void stuck();
  void make_ready(Fiber* fiber) { fiber->state = State::ready, ready_.push_back(fiber); }

  uint64_t seed_ = 0, random_ = 0;
  unsigned launches_ = 0, threads_ = 0, cluster_size_ = 1, waits_for_ = 1, live_target_ = 1;
  size_t shared_bytes_ = 0;
  unsigned order_ = 0, order_left_ = 0, copy_delay_ = 0;
  std::map<const void*, char> clocks_;  // addresses for ThreadSanitizer
  const Fiber* kept_back_ = nullptr;
  std::vector<unsigned> to_start_;  // first blocks of clusters
  std::vector<std::unique_ptr<Cluster>> live_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_, parked_, idle_;  // parked: at an mbarrier or a counter
};

inline Machine machine;

}  // namespace fused_kd::emulator

#pragma GCC visibility pop

#include "lifetime.h"
#include "report.h"
#include "scheduler.h"
