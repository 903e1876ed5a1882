#define FUSED_KD_ISA generic
#define FUSED_KD_LANES 4
#include "product_kernels.h"

FUSED_KD_DEFINE_PRODUCT(product_generic)
