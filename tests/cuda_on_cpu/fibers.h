// Flows of control that can be left and entered again, all on one processor thread. Assembly on
// x86-64 (swapcontext makes two system calls), ucontext elsewhere.
// Every switch is reported to AddressSanitizer, else it takes the new stack for a corrupted old one.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sanitizers.h"

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)

#ifdef EMULATOR_ASSEMBLY
extern "C" void fused_kd_switch_stack(void** save, void* load);
// Outside any function, so that the compiler assumes nothing about registers.
asm(R"(
.pushsection .text.fused_kd_switch_stack,"axG",@progbits,fused_kd_switch_stack,comdat
.weak fused_kd_switch_stack
.hidden fused_kd_switch_stack
.type fused_kd_switch_stack,@function
fused_kd_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_kd_switch_stack,.-fused_kd_switch_stack
.popsection
)");
#endif

namespace fused_kd::emulator {

struct Flow {
  const void* bottom = nullptr;  // of its stack
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* identity = nullptr;    // ThreadSanitizer's
#ifdef EMULATOR_ASSEMBLY
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

inline Flow* left = nullptr;  // the flow that the last switch came from

// What happens first in a flow after it has been switched to.
inline void arrived(Flow& flow) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(flow.fake_stack, &left->bottom, &left->size);
#endif
}

EMULATOR_UNSEEN inline void switch_flow(Flow& from, Flow& to) {
  left = &from;
  become(to.identity);
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef EMULATOR_ASSEMBLY
  fused_kd_switch_stack(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from);
}

// Gives the flow its own stack, with a page below that must not be touched. `entry` begins with
// arrived() and never returns.
inline void create_flow(Flow& flow, void (*entry)()) {
  constexpr size_t GUARD = 4096 * 16, STACK = 256 * 1024;  // only touched pages take memory
  void* memory =
      mmap(nullptr, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* bottom = static_cast<char*>(memory) + GUARD;
  if (memory == MAP_FAILED || mprotect(bottom, STACK, PROT_READ | PROT_WRITE) != 0) {
    perror("cuda_on_cpu: no memory for a thread's stack");
    abort();
  }
  flow.bottom = bottom;
  flow.size = STACK;
#ifdef EMULATOR_ASSEMBLY
  void** top = reinterpret_cast<void**>(bottom + STACK);
  *--top = nullptr;                         // a backtrace ends there
  *--top = reinterpret_cast<void*>(entry);  // the switch returns to it
  flow.top = top - 6;                       // six registers, zero in fresh memory
#else
  getcontext(&flow.context);
  flow.context.uc_stack.ss_sp = bottom;
  flow.context.uc_stack.ss_size = STACK;
  flow.context.uc_link = nullptr;
  makecontext(&flow.context, entry, 0);
#endif
}

}  // namespace fused_kd::emulator

#pragma GCC visibility pop
