#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fused_kd {

// Of arch_prctl, since Linux 5.16.
constexpr long ARCH_GET_XCOMP_SUPP = 0x1021, ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;

bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILES)) return false;
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &features) == 0 && features >> XTILEDATA & 1;
}

// Refused if the alternate signal stack of a thread is too small for the registers.
bool request_amx() { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0; }

}  // namespace fused_kd
#else
namespace fused_kd {
bool has_amx() { return false; }
bool request_amx() { return false; }
}  // namespace fused_kd
#endif
