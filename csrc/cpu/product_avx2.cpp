#define FUSED_KD_ISA avx2
#define FUSED_KD_LANES 8
#include "product_kernels.h"

FUSED_KD_DEFINE_PRODUCT(product_avx2)
