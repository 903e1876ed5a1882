#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fused_kd {

static bool ask() {
  constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILES)) return false;
  // for all threads; refused by a system without AMX, and if a signal stack is too small for tiles
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

bool may_use_amx() {
  static const bool may = ask();
  return may;
}

}  // namespace fused_kd
#else
namespace fused_kd {
bool may_use_amx() { return false; }
}  // namespace fused_kd
#endif
