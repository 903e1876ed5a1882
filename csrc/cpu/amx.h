// The tile registers of AMX, which a process may use only after it asked for them.
#pragma once

namespace fused_kd {

// Returns true if this processor multiplies bfloat16 in tile registers, and if the system saves
// them, for which it is asked once.
bool may_use_amx();

}  // namespace fused_kd
