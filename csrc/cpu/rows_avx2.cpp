#define FUSED_KD_ISA avx2
#define FUSED_KD_LANES 8
#include "block_kernels.h"

FUSED_KD_DEFINE_TABLE(kernels_avx2, "avx2")
