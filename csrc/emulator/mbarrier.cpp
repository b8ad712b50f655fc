// mbarrier (PTX ISA, "Parallel synchronization and communication instructions: mbarrier"). The object's eight bytes
// hold a tag that ordinary code has no business to change; the counts live beside the block, so that misuse is named.
#include <cstring>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

constexpr int64_t kMaxTransactionBytes = (1 << 20) - 1;

static uint64_t tag_of(uint32_t address) { return 0xBA221E4000000000ull | address; }

static uint64_t* tag_in_memory(Block& block, uint32_t address, const Site& site) {
  return reinterpret_cast<uint64_t*>(shared_pointer(block, address, sizeof(uint64_t), sizeof(uint64_t), site));
}

static MBarrier* lookup(Block& block, uint32_t address) {
  for (auto& barrier : block.mbarriers) {
    if (barrier->address == address) return barrier.get();
  }
  return nullptr;
}

MBarrier& find_mbarrier(Block& block, uint32_t address, const Site& site) {
  const uint64_t tag = *tag_in_memory(block, address, site);
  MBarrier* barrier = lookup(block, address);
  if (barrier == nullptr) fail(site, "the mbarrier at shared address %u is used before mbarrier.init", address);
  if (tag != tag_of(address)) fail(site, "the mbarrier at shared address %u was overwritten", address);
  return *barrier;
}

MBarrier& find_mbarrier(uint32_t address, const Site& site) {
  return find_mbarrier(*current_thread().block, address, site);
}

void mbarrier_init(uint32_t address, int count, Site site) {
  const IgnoreScope hidden;
  Block& block = *current_thread().block;
  uint64_t* tag = tag_in_memory(block, address, site);
  if (count < 1 || count >= 1 << 20) fail(site, "a count of %d", count);
  if (lookup(block, address) != nullptr) fail(site, "the mbarrier is initialised already; mbarrier.inval comes first");
  *tag = tag_of(address);
  auto barrier = std::make_unique<MBarrier>();
  barrier->address = address;
  barrier->expected = barrier->pending = count;
  barrier->initialised_at = site;
  block.mbarriers.push_back(std::move(barrier));
}

void mbarrier_inval(uint32_t address, Site site) {
  const IgnoreScope hidden;
  Block& block = *current_thread().block;
  MBarrier& barrier = find_mbarrier(address, site);
  if (!barrier.waiting.empty()) fail(site, "threads wait at this mbarrier");
  *tag_in_memory(block, address, site) = ~uint64_t{0};
  std::erase_if(block.mbarriers, [&](const auto& other) { return other.get() == &barrier; });
}

// Until then neither the asynchronous proxy nor other blocks know the barriers that this block initialised.
void fence_mbarrier_init() {
  for (auto& barrier : current_thread().block->mbarriers) barrier->visible_to_async_proxy = true;
}

static void complete_phase_if_due(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.transaction_bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  for (Thread* thread : barrier.waiting) make_ready(*thread);
  barrier.waiting.clear();
}

static void add_transaction_bytes(MBarrier& barrier, int64_t bytes, const Site& site) {
  barrier.transaction_bytes += bytes;
  if (barrier.transaction_bytes > kMaxTransactionBytes || barrier.transaction_bytes < -kMaxTransactionBytes) {
    fail(site, "the mbarrier expects %lld bytes; its counter ends at 2^20 - 1",
         static_cast<long long>(barrier.transaction_bytes));
  }
}

void arrive_without_yield(MBarrier& barrier, int arrivals, int64_t transaction_bytes, const Site& site) {
  add_transaction_bytes(barrier, transaction_bytes, site);
  if (arrivals > barrier.pending) {
    fail(site, "more arrivals in phase %u than the %d that the mbarrier of %s expects", barrier.phase, barrier.expected,
         site_text(barrier.initialised_at).c_str());
  }
  barrier.pending -= arrivals;
  complete_phase_if_due(barrier);
}

void complete_transaction(MBarrier& barrier, int64_t bytes, const Site& site) {
  add_transaction_bytes(barrier, -bytes, site);
  complete_phase_if_due(barrier);
}

void mbarrier_arrive(uint32_t address, int arrivals, int64_t transaction_bytes, Site site) {
  const IgnoreScope hidden;
  take_proxy_fence(current_thread());
  MBarrier& barrier = find_mbarrier(address, site);
  if (arrivals > 0) tsan_release(&barrier);
  arrive_without_yield(barrier, arrivals, transaction_bytes, site);
  maybe_yield(site);
}

// Returns once the phase of that parity has completed, that is, while the barrier is in a phase of the other parity.
void mbarrier_wait_parity(uint32_t address, int parity, Site site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  take_proxy_fence(self);
  maybe_yield(site);
  for (;;) {
    MBarrier& barrier = find_mbarrier(address, site);
    if ((barrier.phase & 1) != (static_cast<uint32_t>(parity) & 1)) {
      tsan_acquire(&barrier);
      return;
    }
    barrier.waiting.push_back(&self);
    wait_here(site);
  }
}

}  // namespace fastattn::emu
