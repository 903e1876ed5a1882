// Conversions between float32 and the 16-bit types, as the block kernels of one instruction set make
// them: a library for tests, compiled with the flags of that set's kernel file.
#include "../../csrc/cpu/block_kernels.h"

using namespace fused_kd;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void narrow(int dtype, const float* from, void* to, int size) {
  FUSED_KD_ISA::narrow(Dtype(dtype), from, to, size);
}

EXPORT void widen(int dtype, const void* from, float* to, int size) {
  FUSED_KD_ISA::widen(Dtype(dtype), from, to, size);
}
