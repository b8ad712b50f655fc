#include "common/memory.h"

#include <c10/core/impl/alloc_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>

#include <fstream>
#include <string>
#endif

namespace fastattn {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

#if defined(__linux__)
// Linux 6.1's, which older headers lack; older systems refuse it.
constexpr int kMadviseCollapse = 25;

// The request works whatever the administrator has set: it is on us to heed that.
bool huge_pages_are_allowed() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  return std::getline(file, setting) && setting.find("[never]") == std::string::npos;
}
#endif

}  // namespace

void* allocate_aligned(int64_t bytes) { return c10::alloc_cpu(static_cast<size_t>(bytes)); }

void free_aligned(void* memory) { c10::free_cpu(memory); }

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallestBuffer = int64_t{2} << 20;
  if (bytes < kSmallestBuffer) return;
  // Only whole huge pages inside the buffer: the rest may belong to somebody else.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  // A refused hint costs speed, nothing else.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void gather_into_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kSmallestBuffer = int64_t{256} << 10;
  static const bool allowed = huge_pages_are_allowed();
  if (!allowed || bytes < kSmallestBuffer) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  // One by one: the first and the last may reach beyond what is mapped, and are refused. That costs speed, nothing
  // else.
  for (uintptr_t page = begin; page < end; page += kHugePage) {
    (void)madvise(reinterpret_cast<void*>(page), kHugePage, kMadviseCollapse);
  }
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastattn
