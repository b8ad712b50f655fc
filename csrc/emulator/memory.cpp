#include "emulator/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

#include "emulator/launch.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

static size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

GuardedMemory::GuardedMemory(size_t bytes) {
  const size_t page = page_bytes();
  bytes_ = std::max<size_t>((bytes + page - 1) / page, 1) * page;
  void* mapping = mmap(nullptr, bytes_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(mapping) + page;
  if (mprotect(data_, bytes_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

GuardedMemory::~GuardedMemory() {
  asan_unpoison(data_, bytes_);
  munmap(data_ - page_bytes(), bytes_ + 2 * page_bytes());
}

// ---- shared memory

uint8_t* shared_pointer(const Block& block, uint32_t address, size_t bytes, size_t alignment, const Site& site) {
  if (address >= kClusterWindow) fail(site, "an address of mapa, which only shared::cluster instructions take");
  const int64_t offset = int64_t{address} - kSharedBase;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > block.shared_bytes) {
    const int64_t dynamic = offset - static_cast<int64_t>(kStaticSharedBytes);
    fail(site, "%zu bytes at offset %lld of dynamic shared memory, which has %zu bytes", bytes,
         static_cast<long long>(dynamic), block.shared_bytes - kStaticSharedBytes);
  }
  if (address % alignment != 0) {
    fail(site, "shared address %u is not %zu-byte aligned", address, alignment);
  }
  return block.shared + offset;
}

uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const Site& site) {
  return shared_pointer(*current_thread().block, address, bytes, alignment, site);
}

uint32_t shared_address(const void* pointer, Site site) {
  const Block& block = *current_thread().block;
  const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) > block.shared_bytes) fail(site, "not a pointer to shared memory");
  return kSharedBase + static_cast<uint32_t>(offset);
}

void poison(Block& block, uint32_t address, size_t bytes, bool async_view_too) {
  std::memset(block.shared + (address - kSharedBase), kPoisonByte, bytes);
  if (async_view_too) std::memset(block.async_view + (address - kSharedBase), kPoisonByte, bytes);
}

// Static shared memory lies below the dynamic part, each array followed by a red zone that is checked at the block's
// end.
static void add_static_slot(Block& block, const void* key, size_t start, size_t bytes) {
  uint8_t* const memory = block.shared + start;
  block.static_slots.push_back({key, memory, bytes});
  asan_unpoison(memory, bytes + kRedZoneBytes);
  std::memset(memory + bytes, kRedZoneByte, kRedZoneBytes);
  asan_poison(memory + bytes, kRedZoneBytes);
  block.static_bytes = start + bytes + kRedZoneBytes;
  block.red_zones.push_back(memory + bytes);
}

// A device refuses the launch. Dynamic shared memory starts at a multiple of 1024 there, behind the static arrays.
static void check_shared_limit(const Block& block, size_t new_static_bytes, const Site& site) {
  constexpr size_t kDynamicAlignment = 1024;
  size_t bytes = new_static_bytes;
  for (const StaticSlot& slot : block.static_slots) bytes += slot.bytes;
  const size_t dynamic_bytes = block.shared_bytes - kStaticSharedBytes;
  if (dynamic_bytes > 0)
    bytes = (bytes + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment + dynamic_bytes;
  if (bytes > block.shared_limit) {
    fail(site, "%zu bytes of static and dynamic shared memory; the limit of this launch is %zu", bytes,
         block.shared_limit);
  }
}

std::string shared_request_problem(const void* kernel, SharedMemory shared) {
  if (!shared.asks_for_more || shared.dynamic_bytes > config().max_shared_bytes) return "";
  static std::mutex mutex;
  static std::unordered_map<const void*, size_t> asked;
  const std::lock_guard lock(mutex);
  const size_t before = asked.emplace(kernel, shared.dynamic_bytes).first->second;
  if (before == shared.dynamic_bytes) return "";
  return "launch: the kernel asks for " + std::to_string(shared.dynamic_bytes) +
         " bytes of dynamic shared memory, and has asked for " + std::to_string(before) +
         " before: threads that launch it at once would set the limit for each other. Ask for the largest always";
}

// Arrays lie in the order in which they are met first, at the same place in all blocks of a cluster.
void* static_shared(const void* key, size_t bytes, size_t alignment, Site site) {
  const IgnoreScope hidden;
  Block& block = *current_thread().block;
  for (const StaticSlot& slot : block.static_slots) {
    if (slot.key == key) return slot.memory;
  }
  const size_t start = (block.static_bytes + alignment - 1) / alignment * alignment;
  if (start + bytes + kRedZoneBytes > kStaticSharedBytes) {
    fail(site, "static shared memory exceeds the emulator's %zu bytes; use dynamic shared memory", kStaticSharedBytes);
  }
  check_shared_limit(block, bytes, site);
  for (Block* each : block.cluster->blocks) add_static_slot(*each, key, start, bytes);
  return block.shared + start;
}

void prepare_shared(Block& block, size_t mapped_bytes) {
  asan_unpoison(block.shared, mapped_bytes);
  std::memset(block.shared, kPoisonByte, block.shared_bytes);
  std::memset(block.async_view, kPoisonByte, block.shared_bytes);
  std::memset(block.shared + block.shared_bytes, kRedZoneByte, mapped_bytes - block.shared_bytes);
  asan_poison(block.shared, kStaticSharedBytes);
  asan_poison(block.shared + block.shared_bytes, mapped_bytes - block.shared_bytes);
  block.static_slots.clear();
  block.static_bytes = 0;
  block.red_zones.clear();
}

static bool is_untouched(const uint8_t* begin, size_t bytes) {
  return std::all_of(begin, begin + bytes, [](uint8_t byte) { return byte == kRedZoneByte; });
}

std::string red_zone_damage(Block& block, size_t mapped_bytes) {
  asan_unpoison(block.shared, mapped_bytes);
  if (!is_untouched(block.shared + block.shared_bytes, mapped_bytes - block.shared_bytes)) {
    return "the block wrote past the end of its dynamic shared memory (" +
           std::to_string(block.shared_bytes - kStaticSharedBytes) + " bytes)";
  }
  for (const uint8_t* zone : block.red_zones) {
    if (!is_untouched(zone, kRedZoneBytes)) return "the block wrote past the end of a static shared array";
  }
  return "";
}

void misaligned(const void* pointer, int bytes, const Site& site) {
  fail(site, "address %p is not %d-byte aligned", pointer, bytes);
}

// ---- global memory

struct GlobalRange {
  const uint8_t* begin;
  size_t bytes;
};
static std::vector<GlobalRange>& global_ranges() {
  static std::vector<GlobalRange> ranges;
  return ranges;
}

void declare_global(const void* begin, size_t bytes) {
  global_ranges().push_back({static_cast<const uint8_t*>(begin), bytes});
}
void forget_globals() { global_ranges().clear(); }

void check_global(const void* pointer, size_t bytes, const Site& site, const char* access) {
  const auto* begin = static_cast<const uint8_t*>(pointer);
  if (bytes == 0 || global_ranges().empty()) return;
  for (const GlobalRange& range : global_ranges()) {
    if (begin >= range.begin && begin + bytes <= range.begin + range.bytes) return;
  }
  fail(site, "%s %zu bytes of global memory at %p, outside every tensor of this launch", access, bytes, pointer);
}

}  // namespace fastattn::emu
