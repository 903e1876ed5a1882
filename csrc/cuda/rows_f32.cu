// The row kernels for a student in this type.
#define FUSED_KD_STUDENT f32
#include "instances.h"
