#define FUSED_KD_ISA amx
#define FUSED_KD_LANES 16
#include "product_kernels.h"

FUSED_KD_DEFINE_PRODUCT(product_amx)
