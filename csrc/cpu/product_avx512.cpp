#define FUSED_KD_ISA avx512
#define FUSED_KD_LANES 16
#include "product_kernels.h"

FUSED_KD_DEFINE_PRODUCT(product_avx512)
