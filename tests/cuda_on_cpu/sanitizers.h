// What the emulator reports to AddressSanitizer and ThreadSanitizer; nothing without them.
#pragma once

#include <stddef.h>

#ifdef __SANITIZE_ADDRESS__
#define EMULATOR_ASAN 1
#endif
#ifdef __SANITIZE_THREAD__
#define EMULATOR_TSAN 1
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
#endif
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

// For what the scheduler shares with kernels, and is no memory access of theirs.
#define EMULATOR_UNSEEN __attribute__((noinline, no_sanitize("thread")))

namespace fused_kd::emulator {

inline void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}
inline bool readable([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  return __asan_region_is_poisoned(const_cast<void*>(p), bytes) == nullptr;
#else
  return true;
#endif
}

// To ThreadSanitizer every fiber is a thread, and the scheduler the host's. Switches order nothing:
// what comes before what follows from release and acquire alone.
inline void* new_identity() {
#ifdef EMULATOR_TSAN
  return __tsan_create_fiber(0);
#else
  return nullptr;
#endif
}
inline void* own_identity() {
#ifdef EMULATOR_TSAN
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}
inline void become([[maybe_unused]] void* identity) {
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync);
#endif
}
inline void release([[maybe_unused]] char& clock) {
#ifdef EMULATOR_TSAN
  __tsan_release(&clock);
#endif
}
inline void acquire([[maybe_unused]] char& clock) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(&clock);
#endif
}

// A thread inside a primitive: what it reads and writes there is the emulator's, not the kernel's.
struct Inside {
#ifdef EMULATOR_TSAN
  Inside() { __tsan_ignore_thread_begin(); }
  ~Inside() { __tsan_ignore_thread_end(); }
#else
  Inside() {}  // not trivial: an unused variable would be warned of
#endif
  Inside(const Inside&) = delete;
};

}  // namespace fused_kd::emulator
