// The row kernels for a student in this type.
#define FUSED_KD_STUDENT bf16
#include "instances.h"
