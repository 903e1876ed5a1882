#define FUSED_KD_ISA avx512
#define FUSED_KD_LANES 16
#include "block_kernels.h"

FUSED_KD_DEFINE_TABLE(kernels_avx512, "avx512")
