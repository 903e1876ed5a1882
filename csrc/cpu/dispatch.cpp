// Selects the instruction set: the best that the processor and the operating system support, or the
// one that FUSED_KD_CPU names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "amx.h"
#include "kernels.h"

namespace fused_kd {

extern const Kernels kernels_generic;
extern const ProductKernels product_generic;
#ifdef FUSED_KD_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
extern const ProductKernels product_avx2, product_avx512, product_avx512_bf16, product_amx;

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Candidate* candidates(int* count) {
  static const Candidate all[] = {
#ifdef FUSED_KD_X86
      {"amx", &kernels_avx512_bf16, &product_amx, has_avx512_bf16() && may_use_amx()},
      {"avx512_bf16", &kernels_avx512_bf16, &product_avx512_bf16, has_avx512_bf16()},
      {"avx512", &kernels_avx512, &product_avx512, has_avx512()},
      {"avx2", &kernels_avx2, &product_avx2, has_avx2()},
#endif
      {"generic", &kernels_generic, &product_generic, true},
  };
  *count = sizeof all / sizeof all[0];
  return all;
}

static const Candidate* find(const std::string& name) {
  int count;
  const Candidate* all = candidates(&count);
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (name.empty() ? all[i].runs : name == all[i].name) {
      if (!all[i].runs)
        throw std::runtime_error("FUSED_KD_CPU=" + name + ": this processor has no " + name);
      return &all[i];
    }
    known += std::string(i ? ", " : "") + all[i].name;
  }
  throw std::runtime_error("FUSED_KD_CPU: expected one of " + known + ", got '" + name + "'");
}

static std::atomic<const Candidate*> chosen{nullptr};

void choose_kernels(const char* name) {
  const char* environment = std::getenv("FUSED_KD_CPU");
  chosen = find(*name ? name : environment ? environment : "");
}

static const Candidate& choice() {
  if (!chosen) choose_kernels("");
  return *chosen;
}
const char* instruction_set() { return choice().name; }
const Kernels& kernels() { return *choice().rows; }
const ProductKernels& product_kernels() { return *choice().product; }

}  // namespace fused_kd
