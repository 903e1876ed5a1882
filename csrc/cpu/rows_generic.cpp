#define FUSED_KD_ISA generic
#define FUSED_KD_LANES 4
#include "block_kernels.h"

FUSED_KD_DEFINE_TABLE(kernels_generic, "generic")
