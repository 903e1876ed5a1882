#include "huge_pages.h"

#if defined(__linux__)
#include <glob.h>
#include <sys/mman.h>

#include <fstream>
#include <string>
#endif

namespace fused_kd {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

std::string first_word(const std::string& path) {
  std::string word;
  std::ifstream(path) >> word;
  return word;
}

// Returns whether this is a virtual machine whose host takes back what it frees (a virtio balloon
// with free page reporting). The host looks for large free blocks, so a huge page that was freed
// must be fetched from it again: 5 times the cost of small pages, where it is else a sixth.
bool host_takes_freed_memory() {
  constexpr const char *balloon = "0x0005", *devices = "/sys/bus/virtio/devices/*";
  constexpr size_t reporting = 5;  // VIRTIO_BALLOON_F_REPORTING
  bool found = false;
  glob_t paths{};
  if (glob(devices, 0, nullptr, &paths) == 0)
    for (size_t i = 0; i < paths.gl_pathc; ++i) {
      const std::string path = paths.gl_pathv[i], features = first_word(path + "/features");
      found |= first_word(path + "/device") == balloon && features.size() > reporting &&
               features[reporting] == '1';
    }
  globfree(&paths);
  return found;
}

}  // namespace

void request_huge_pages(uintptr_t begin, uintptr_t end) {
  constexpr uintptr_t page = 4096, huge = 2 << 20;
  static const bool cheap = !host_takes_freed_memory();
  begin = (begin + page - 1) & -page;
  end &= -page;
  if (cheap && end > begin + 2 * huge)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void request_huge_pages(uintptr_t, uintptr_t) {}

#endif

}  // namespace fused_kd
