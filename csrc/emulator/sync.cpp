// Meeting points of threads: warp collectives, barriers, the fence between the generic and the asynchronous proxy.
#include <bit>
#include <cstring>
#include <utility>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

// ---- fence.proxy.async. The fence of one thread is carried out at the next point where it can matter to anyone: when
// the thread synchronises or starts an asynchronous operation. So a barrier of 384 threads copies once, not 384 times.

void publish_to_async_proxy(Block& block) {
  const size_t dynamic_bytes = block.shared_bytes - kStaticSharedBytes;
  std::memcpy(block.async_view + kStaticSharedBytes, block.shared + kStaticSharedBytes, dynamic_bytes);
  for (const StaticSlot& slot : block.static_slots) {
    std::memcpy(block.async_view + (slot.memory - block.shared), slot.memory, slot.bytes);
  }
}

void take_proxy_fence(Thread& thread) {
  if (std::exchange(thread.wants_proxy_fence, false)) publish_to_async_proxy(*thread.block);
}

void fence_proxy_async() {
  Thread& self = current_thread();
  self.wants_proxy_fence = true;
  for (auto& barrier : self.block->mbarriers) barrier->visible_to_async_proxy = true;
}

// ---- collectives of a warp

static Rendezvous& find_rendezvous(Warp& warp, int lane, uint32_t mask, const Site& site) {
  for (Rendezvous& meeting : warp.rendezvous) {
    if (meeting.arrived == 0 || (meeting.mask & mask) == 0) continue;
    const bool same = meeting.mask == mask && meeting.site.op == site.op && meeting.site.line == site.line &&
                      meeting.site.file == site.file;
    if (!same) {
      fail(site, "warp %d diverged: lane %d is here with mask %08x while lanes %08x wait in %s with mask %08x", warp.id,
           lane, mask, meeting.arrived, site_text(meeting.site).c_str(), meeting.mask);
    }
    return meeting;
  }
  for (Rendezvous& meeting : warp.rendezvous) {
    if (meeting.arrived != 0) continue;
    meeting.mask = mask;
    meeting.site = site;
    return meeting;
  }
  fail(site, "more than four partial-warp instructions in flight in warp %d", warp.id);
}

Rendezvous* enter_collective(uint32_t mask, const Site& site, void* argument, bool orders_memory) {
  Thread& self = current_thread();
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  mask &= warp.lanes;
  if ((mask & bit) == 0) fail(site, "the calling lane %d is not in its mask %08x", self.lane, mask);
  Rendezvous& meeting = find_rendezvous(warp, self.lane, mask, site);
  meeting.arguments[self.lane] = argument;
  meeting.arrived |= bit;
  meeting.wants_proxy_fence |= std::exchange(self.wants_proxy_fence, false);
  if (orders_memory) tsan_release(&meeting);
  if (meeting.arrived != meeting.mask) {
    wait_here(site);
    if (orders_memory) tsan_acquire(&meeting);
    return nullptr;
  }
  if (orders_memory) tsan_acquire(&meeting);
  if (std::exchange(meeting.wants_proxy_fence, false)) publish_to_async_proxy(*self.block);
  return &meeting;
}

void leave_collective(Rendezvous& meeting, bool orders_memory) {
  Thread& self = current_thread();
  if (orders_memory) tsan_release(&meeting);
  meeting.arrived = 0;
  for (uint32_t others = meeting.mask & ~(1u << self.lane); others != 0; others &= others - 1) {
    make_ready(*self.warp->thread[std::countr_zero(others)]);
  }
}

void sync_warp(uint32_t mask, Site site) {
  const IgnoreScope hidden;
  if (Rendezvous* meeting = enter_collective(mask, site, nullptr, true)) leave_collective(*meeting, true);
}

// ---- barriers of a block

// bar.sync and bar.arrive are "aligned": all lanes of a warp execute the same one.
static void check_aligned(Barrier& barrier, const Warp& warp, const Site& site) {
  Site& first = barrier.warp_site[warp.id];
  if (first.op == nullptr) first = site;
  if (first.line != site.line || first.file != site.file) {
    fail(site, "lanes of warp %d reached the same barrier from different lines; others came from %s", warp.id,
         site_text(first).c_str());
  }
}

static void complete_barrier(Block& block, Barrier& barrier) {
  barrier.arrived = 0;
  for (Site& site : barrier.warp_site) site = {};
  if (std::exchange(barrier.wants_proxy_fence, false)) publish_to_async_proxy(block);
  for (Thread* thread : barrier.waiting) make_ready(*thread);
  barrier.waiting.clear();
}

static void arrive_at_barrier(int id, int threads, bool waits, const Site& site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  Block& block = *self.block;
  if (id < 0 || id > 15) fail(site, "barrier %d is not one of 0 to 15", id);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) {
    fail(site, "barrier %d is used with %d threads here and %d elsewhere", id, threads, barrier.expected);
  }
  check_aligned(barrier, *self.warp, site);
  barrier.wants_proxy_fence |= std::exchange(self.wants_proxy_fence, false);
  tsan_release(&barrier);
  if (++barrier.arrived == barrier.expected) {
    complete_barrier(block, barrier);
    if (config().schedule != Schedule::kInOrder) yield(site);
  } else if (waits) {
    barrier.waiting.push_back(&self);
    wait_here(site);
  } else {
    maybe_yield(site);
  }
  if (waits) tsan_acquire(&barrier);
}

void sync_block(Site site) {
  arrive_at_barrier(0, static_cast<int>(current_thread().block->threads.size()), true, site);
}

static void named_barrier(int id, int threads, bool waits, const Site& site) {
  const int block_threads = static_cast<int>(current_thread().block->threads.size());
  if (threads % kWarpSize != 0) fail(site, "%d threads: a barrier counts whole warps", threads);
  if (threads < kWarpSize || threads > (block_threads + kWarpSize - 1) / kWarpSize * kWarpSize) {
    fail(site, "%d threads: the block has %d", threads, block_threads);
  }
  arrive_at_barrier(id, threads, waits, site);
}

void bar_sync(int id, int threads, Site site) { named_barrier(id, threads, true, site); }
void bar_arrive(int id, int threads, Site site) { named_barrier(id, threads, false, site); }

}  // namespace fastattn::emu
