// The tile registers of AMX, which Linux grants to a process on request.
#pragma once

namespace fused_kd {

// Returns true if the processor multiplies bfloat16 in tile registers and the system can grant them.
bool has_amx();
// Requests permission to use them, for all threads of the process; returns true if it is granted.
bool request_amx();

}  // namespace fused_kd
