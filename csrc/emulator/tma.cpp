// Bulk copies of the tensor memory accelerator (PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor",
// "cp.reduce.async.bulk"). They run in the asynchronous proxy: a load writes both views of shared memory, a store reads
// the view that ordinary stores reach only through fence.proxy.async. What a load writes over must have reached it,
// too: nothing else orders it behind an ordinary store, which might come later (PTX ISA, "Causality order").
#include <cstring>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

constexpr uint32_t kChunkBytes = 16;  // the granule of every swizzle

const char* encode_tensor_map(TensorMap& map, int element, int element_bytes, void* base, int rank, const uint64_t* dim,
                              const uint64_t* stride_bytes, const uint32_t* box, int swizzle_bytes) {
  if (rank < 1 || rank > 5) return "tensor map: the rank must be 1 to 5";
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "tensor map: the base must be 16-byte aligned";
  map = TensorMap{};
  map.base = reinterpret_cast<uintptr_t>(base);
  map.rank = static_cast<uint8_t>(rank);
  map.element = static_cast<uint8_t>(element);
  map.element_bytes = static_cast<uint8_t>(element_bytes);
  map.swizzle_bytes = static_cast<uint8_t>(swizzle_bytes);
  map.magic = TensorMap::kMagic;
  for (int i = 0; i < rank; ++i) {
    if (dim[i] < 1 || dim[i] > uint64_t{1} << 32) return "tensor map: a dimension must be 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "tensor map: a side of the box must be 1 to 256";
    if (i > 0 && (stride_bytes[i - 1] % 16 != 0 || stride_bytes[i - 1] >= uint64_t{1} << 40)) {
      return "tensor map: strides must be multiples of 16 bytes and below 2^40";
    }
    map.dim[i] = dim[i];
    map.stride_bytes[i] = i == 0 ? static_cast<uint64_t>(element_bytes) : stride_bytes[i - 1];
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  const uint64_t row_bytes = uint64_t{box[0]} * static_cast<uint64_t>(element_bytes);
  if (row_bytes % 16 != 0) return "tensor map: the box's rows must be a multiple of 16 bytes";
  if (swizzle_bytes != 0 && row_bytes > static_cast<uint64_t>(swizzle_bytes)) {
    return "tensor map: the box's rows are longer than the swizzle";
  }
  return nullptr;
}

// ---- tiles

struct Tile {
  TensorMap map;  // copied at issue
  uint32_t shared;
  int32_t origin[5];
};

static uint32_t tile_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls visit(shared offset in the block, global pointer, begin, end) for each 16-byte chunk of the tile: its bytes
// [begin, end) lie inside the tensor, the others are out of bounds.
template <typename Visit>
static void for_each_chunk(const Tile& tile, Visit&& visit) {
  const TensorMap& map = tile.map;
  const int64_t size = map.element_bytes;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const uint32_t rows = tile_bytes(map) / row_bytes;
  int32_t at[5] = {};
  for (uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t row_offset = 0;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t coordinate = int64_t{tile.origin[d]} + at[d];
      inside &= coordinate >= 0 && coordinate < static_cast<int64_t>(map.dim[d]);
      row_offset += coordinate * static_cast<int64_t>(map.stride_bytes[d]);
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += kChunkBytes) {
      const int64_t start = tile.origin[0] * size + byte;
      const int64_t length = static_cast<int64_t>(map.dim[0]) * size;
      const int64_t begin = inside ? std::clamp<int64_t>(-start, 0, kChunkBytes) : 0;
      const int64_t end = inside ? std::clamp<int64_t>(length - start, begin, kChunkBytes) : 0;
      const uint32_t address = swizzle_address(tile.shared + row * row_bytes + byte, map.swizzle_bytes);
      auto* global = reinterpret_cast<uint8_t*>(map.base + static_cast<uint64_t>(row_offset + start));
      visit(address - kSharedBase, global, static_cast<uint32_t>(begin), static_cast<uint32_t>(end));
    }
    for (int d = 1; d < map.rank && ++at[d] == map.box[d]; ++d) at[d] = 0;
  }
}

static Tile checked_tile(const TensorMap& map, uint32_t shared, const int32_t* coordinates, int rank,
                         const Site& site) {
  if (map.magic != TensorMap::kMagic) fail(site, "not an encoded tensor map");
  if (map.rank != rank) fail(site, "%d coordinates for a tensor map of rank %d", rank, map.rank);
  // CUDA C++ Programming Guide, "The Swizzle Modes": shared memory must hold rows as wide as the swizzle. How shorter
  // ones would lie there it does not say.
  const int row_bytes = map.box[0] * map.element_bytes;
  if (map.swizzle_bytes != 0 && row_bytes != map.swizzle_bytes) {
    fail(site, "rows of %d bytes in a swizzle of %d: they would not fill its lines", row_bytes, map.swizzle_bytes);
  }
  // The swizzle follows address bits: only tiles that start at a whole pattern look the same to wgmma and to ldmatrix.
  const size_t alignment = std::max<size_t>(128, size_t{map.swizzle_bytes} * 8);
  shared_pointer(shared, tile_bytes(map), alignment, site);
  Tile tile{map, shared, {}};
  std::memcpy(tile.origin, coordinates, sizeof(int32_t) * static_cast<size_t>(rank));
  for_each_chunk(tile, [&](uint32_t, const uint8_t* global, uint32_t begin, uint32_t end) {
    check_global(global + begin, end - begin, site, "touches");
  });
  return tile;
}

static void load_tile(Block& block, const Tile& tile) {
  for_each_chunk(tile, [&](uint32_t offset, const uint8_t* global, uint32_t begin, uint32_t end) {
    uint8_t chunk[kChunkBytes] = {};
    if (end > begin) std::memcpy(chunk + begin, global + begin, end - begin);
    std::memcpy(block.shared + offset, chunk, kChunkBytes);
    std::memcpy(block.async_view + offset, chunk, kChunkBytes);
  });
}

static void check_fenced(const Block& block, uint32_t offset, size_t bytes, const Site& site, const char* access) {
  for (size_t i = 0; i < bytes; ++i) {
    if (block.shared[offset + i] == block.async_view[offset + i]) continue;
    fail(site, "%s shared offset %zu, which ordinary stores changed without fence.proxy.async", access,
         offset + i - kStaticSharedBytes);
  }
}

// Starts a load that will complete `bytes` of `barrier`.
static void start_load(uint32_t shared, uint32_t bytes, uint32_t barrier, const Site& site,
                       std::function<void()> copy) {
  Block& block = *current_thread().block;
  MBarrier& mbarrier = find_mbarrier(barrier, site);
  if (!mbarrier.visible_to_async_proxy) {
    fail(site, "the mbarrier of %s is not visible to the asynchronous proxy: fence.mbarrier_init is missing",
         site_text(mbarrier.initialised_at).c_str());
  }
  take_proxy_fence(current_thread());
  check_fenced(block, shared - kSharedBase, bytes, site, "writes over");
  tsan_write(block.shared + (shared - kSharedBase), bytes);
  tsan_release(&mbarrier);
  const auto complete = [copy = std::move(copy), &block, barrier, bytes, site] {
    copy();
    complete_transaction(find_mbarrier(block, barrier, site), bytes, site);
  };
  if (completes_late()) {
    poison(block, shared, bytes, true);
    start_operation(block, site, complete);
  } else {
    complete();
  }
}

void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier, const int32_t* coordinates, int rank,
              Site site) {
  const IgnoreScope hidden;
  Block& block = *current_thread().block;
  const Tile tile = checked_tile(map, destination, coordinates, rank, site);
  start_load(destination, tile_bytes(map), barrier, site, [&block, tile] { load_tile(block, tile); });
}

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, Site site) {
  const IgnoreScope hidden;
  Block& block = *current_thread().block;
  uint8_t* target = shared_pointer(destination, bytes, kChunkBytes, site);
  if (reinterpret_cast<uintptr_t>(source) % kChunkBytes != 0 || bytes % kChunkBytes != 0) {
    fail(site, "%u bytes from %p: size and address must be multiples of 16", bytes, source);
  }
  check_global(source, bytes, site, "reads");
  start_load(destination, bytes, barrier, site, [&block, target, source, bytes] {
    std::memcpy(target, source, bytes);
    std::memcpy(block.async_view + (target - block.shared), source, bytes);
  });
}

// ---- stores. Each has two moments: its source is read, its destination is written. Late ones read at wait_group.read
// and write at wait_group, or after the block has ended.

template <typename T, typename Add>
static void add_atomically(uint8_t* global, const uint8_t* value, Add add) {
  T addend;
  std::memcpy(&addend, value, sizeof(T));
  std::atomic_ref<T> target(*reinterpret_cast<T*>(global));
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, add(old, addend), std::memory_order_relaxed)) {
  }
}

// PTX ISA, "cp.reduce.async.bulk": additions in fp32 make denormals 0, those in fp16 and bf16 (.noftz) keep them.
static float add_flushed(float a, float b) { return flush_denormal(flush_denormal(a) + flush_denormal(b)); }

template <typename Half, float (*kToFloat)(Half), Half (*kFromFloat)(float)>
static uint16_t add_halves(uint16_t a, uint16_t b) {
  return kFromFloat(kToFloat({a}) + kToFloat({b})).bits;
}

static void add_element(Element element, uint8_t* global, const uint8_t* value, const Site& site) {
  switch (element) {
    case Element::kFloat32:
      return add_atomically<float>(global, value, add_flushed);
    case Element::kInt32:
      return add_atomically<uint32_t>(global, value, std::plus<uint32_t>());
    case Element::kFloat16:
      return add_atomically<uint16_t>(global, value, add_halves<__half, __half2float, __float2half_rn>);
    case Element::kBFloat16:
      return add_atomically<uint16_t>(global, value, add_halves<__nv_bfloat16, __bfloat162float, __float2bfloat16_rn>);
    default:
      fail(site, "no addition for this element type");
  }
}

// The bytes that a store reads: as they were at issue, which is what they must still be when it reads them.
struct StoreSource {
  uint32_t offset;
  std::vector<uint8_t> bytes;
};

static void start_store(uint32_t shared, uint32_t bytes, const Site& site, std::function<void(const uint8_t*)> write) {
  Thread& self = current_thread();
  Block& block = *self.block;
  take_proxy_fence(self);
  const uint32_t offset = shared - kSharedBase;
  tsan_read(block.shared + offset, bytes);
  check_fenced(block, offset, bytes, site, "reads");
  auto source = std::make_shared<StoreSource>();
  source->offset = offset;
  source->bytes.assign(block.async_view + offset, block.async_view + offset + bytes);
  const auto read_source = [&block, source, site] {
    const uint8_t* now = block.shared + source->offset;
    tsan_read(now, source->bytes.size());
    if (std::memcmp(now, source->bytes.data(), source->bytes.size()) != 0) {
      fail(site, "shared memory was changed before the store had read it (cp.async.bulk.wait_group.read is missing)");
    }
  };
  const auto write_destination = [source, write = std::move(write)] { write(source->bytes.data()); };
  if (completes_late()) {
    self.stores.push_back({read_source, write_destination, self.store_group, site, false});
  } else {
    write_destination();
    self.stores.push_back({nullptr, nullptr, self.store_group, site, false});
  }
}

void tma_store(const TensorMap& map, uint32_t source, const int32_t* coordinates, int rank, bool adds, Site site) {
  const IgnoreScope hidden;
  // PTX ISA, "Restriction on Tensor Copy instructions"; loads may start before the tensor.
  for (int i = 0; i < rank; ++i) {
    if (coordinates[i] < 0) fail(site, "a box that starts at %d in dimension %d", coordinates[i], i);
  }
  const Tile tile = checked_tile(map, source, coordinates, rank, site);
  start_store(source, tile_bytes(map), site, [tile, adds, site](const uint8_t* bytes) {
    for_each_chunk(tile, [&](uint32_t offset, uint8_t* global, uint32_t begin, uint32_t end) {
      const uint8_t* chunk = bytes + (offset - (tile.shared - kSharedBase));
      if (!adds && end > begin) std::memcpy(global + begin, chunk + begin, end - begin);
      for (uint32_t i = begin; adds && i < end; i += tile.map.element_bytes) {
        add_element(static_cast<Element>(tile.map.element), global + i, chunk + i, site);
      }
    });
  });
}

static void check_bulk_store(const void* destination, uint32_t source, uint32_t bytes, const Site& site) {
  shared_pointer(source, bytes, kChunkBytes, site);
  if (reinterpret_cast<uintptr_t>(destination) % kChunkBytes != 0 || bytes % kChunkBytes != 0) {
    fail(site, "%u bytes to %p: size and address must be multiples of 16", bytes, destination);
  }
  check_global(destination, bytes, site, "writes");
}

void bulk_store(void* destination, uint32_t source, uint32_t bytes, Site site) {
  const IgnoreScope hidden;
  check_bulk_store(destination, source, bytes, site);
  start_store(source, bytes, site, [=](const uint8_t* values) { std::memcpy(destination, values, bytes); });
}

void bulk_add(void* destination, uint32_t source, uint32_t bytes, Element element, Site site) {
  const IgnoreScope hidden;
  check_bulk_store(destination, source, bytes, site);
  const uint32_t size = element == Element::kFloat32 || element == Element::kInt32 ? 4 : 2;
  start_store(source, bytes, site, [=](const uint8_t* values) {
    for (uint32_t i = 0; i < bytes; i += size) {
      add_element(element, static_cast<uint8_t*>(destination) + i, values + i, site);
    }
  });
}

void bulk_commit_group() { ++current_thread().store_group; }

static void finish_reading(BulkStore& store) {
  if (store.read_source) store.read_source();
  store.read_source = nullptr;
}

void bulk_wait_group(int groups_in_flight, bool only_read, Site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  for (BulkStore& store : self.stores) {
    if (store.group >= self.store_group - groups_in_flight) continue;
    finish_reading(store);
    store.awaited |= !only_read;
    if (only_read || !store.write_destination) continue;
    store.write_destination();
    store.write_destination = nullptr;
  }
}

// Memory that is still being read must not be given to the next block; writing may go on after the block has ended.
void check_stores_read(Thread& thread) {
  for (BulkStore& store : thread.stores) {
    if (store.read_source) fail(store.site, "the thread exits while this store still reads shared memory");
    if (store.write_destination) thread.block->unfinished_stores.push_back(std::move(store.write_destination));
  }
  thread.stores.clear();
}

}  // namespace fastattn::emu
