// How the emulator gives up.
#pragma once

#include "machine.h"

#pragma GCC visibility push(hidden)

namespace fused_kd::emulator {

inline std::string kernel_name(void (*function)(), const char* type) {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void*>(function), &info) == 0 || info.dli_sname == nullptr) {
    return std::string("(link with -rdynamic for its name) ") + type;
  }
  int status = 0;
  char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? plain : info.dli_sname;
  free(plain);
  return name;
}

inline void Machine::die(const Fiber* fiber, Place place, const char* format, ...) {
  fflush(stdout);
  fprintf(stderr, "cuda_on_cpu: kernel %s", kernel_name(kernel.function, kernel.type).c_str());
  if (fiber) fprintf(stderr, ", block %u, thread %u", fiber->block->index, fiber->thread);
  if (place.line) fprintf(stderr, ", %s:%d", place.file, place.line);
  fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, " (FUSED_KD_EMULATOR_SEED=%llu, launch %u)\n", (unsigned long long)seed_,
          launches_);
  abort();
}

// Nothing can go on. A block that waits in meetings alone is the cause, if there is one; else an
// mbarrier or a counter.
inline void Machine::stuck() {
  const Fiber* culprit = nullptr;
  std::string where;
  for (const auto& cluster : live_) {
    for (const auto& block : cluster->blocks) {
      std::map<std::pair<State, int>, std::vector<const Fiber*>> groups;
      for (const Fiber* fiber : block->fibers) {
        if (!block->ended) groups[{fiber->state, fiber->place.line}].push_back(fiber);
      }
      bool meetings_alone = groups.size() > 1;
      for (const auto& [key, fibers] : groups) {
        char line[120];
        snprintf(line, sizeof line, "\n  block %u: %zu threads, the first is %u, in %s at line %d",
                 block->index, fibers.size(), fibers[0]->thread, STATE_NAMES[int(key.first)],
                 key.second);
        if (where.size() < 2000) where += line;
        const bool outside = key.first == State::phase || key.first == State::counter;
        meetings_alone = meetings_alone && !outside;
        if (!culprit && outside) culprit = fibers[0];
      }
      if (meetings_alone) culprit = groups.begin()->second[0];
      if (meetings_alone) break;
    }
  }
  if (!culprit) culprit = live_[0]->blocks[0]->fibers[0];
  const char* why = "all threads wait";
  if (culprit->state == State::shuffle) why = "part of the warp never comes";
  if (culprit->state == State::block_sync) why = "part of the block never comes";
  if (culprit->state == State::cluster_wait) why = "part of the cluster never comes";
  if (culprit->state == State::phase) why = "the phase can never complete";
  if (culprit->state == State::counter) why = "the count can never be reached";
  die(culprit, culprit->place, "%s: %s%s\n ", STATE_NAMES[int(culprit->state)], why, where.c_str());
}

}  // namespace fused_kd::emulator

#pragma GCC visibility pop
