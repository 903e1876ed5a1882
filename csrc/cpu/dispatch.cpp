// Selects the instruction set: the best that the processor and the operating system support, or the
// one that FUSED_KD_CPU names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "amx.h"
#include "kernels.h"
#include "product.h"

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

// The products in tile registers were never run on a processor with AMX, so their results are
// compared before they are used.
static bool prepare_amx() {
  static const bool is_prepared = request_amx() && agree(product_amx, product_avx512_bf16);
  return is_prepared;
}
#endif

Candidate* candidates(int* count) {
  static Candidate all[] = {
#ifdef FUSED_KD_X86
      {"amx", &kernels_avx512_bf16, &product_amx, has_avx512_bf16() && has_amx(), prepare_amx},
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
  Candidate* all = candidates(&count);
  std::string known;
  for (int i = 0; i < count; ++i) {
    Candidate& candidate = all[i];
    known += std::string(i ? ", " : "") + candidate.name;
    if (!name.empty() && name != candidate.name) continue;
    const bool is_there = candidate.runs;
    if (is_there && (!candidate.prepare || candidate.prepare())) return &candidate;
    candidate.runs = false;
    if (!name.empty())
      throw std::runtime_error("FUSED_KD_CPU=" + name + ": " +
                               (is_there ? "the system refuses it, or its products are wrong here"
                                         : "this processor has no " + name));
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
