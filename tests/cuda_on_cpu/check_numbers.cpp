// The emulator's conversions, by name, over arrays: for the test that compares them with torch's.
#include <string>

#include "numbers.h"

extern "C" int check_numbers(const char* name, const uint32_t* in, uint32_t* out, int64_t count) {
  using namespace fused_kd;
  using emulator::from_word, emulator::to_word;
  const std::string which = name;
  for (int64_t i = 0; i < count; ++i) {
    const float x = from_word(in[i]);
    if (which == "exp2")
      out[i] = to_word(exp2_fast(x));
    else if (which == "from_bf16")
      out[i] = to_word(from_bf16(in[i]));
    else if (which == "from_f16")
      out[i] = to_word(from_f16(in[i]));
    else if (which == "pack_bf16")
      out[i] = pack_bf16(x, -x);
    else if (which == "pack_f16")
      out[i] = pack_f16(x, -x);
    else
      return 1;
  }
  return 0;
}
