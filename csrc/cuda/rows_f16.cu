// The row kernels for a student in this type.
#define FUSED_KD_STUDENT f16
#include "instances.h"
