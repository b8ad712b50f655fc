// Thread block clusters (PTX ISA, "Cluster of cooperative thread arrays", "barrier.cluster", "mapa", "st.async"):
// blocks that live at once and reach each other's shared memory. What a missing cluster barrier breaks on a device
// breaks here: no access to another block before one has completed, which is what says that the block has started; none
// to a block that has exited; and under kPriority a block may be far ahead of the others.
#include <cstring>
#include <utility>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

uint32_t cluster_rank() { return current_thread().block->rank; }
uint32_t cluster_blocks() { return static_cast<uint32_t>(current_thread().block->cluster->blocks.size()); }

// ---- barrier.cluster

static void complete_cluster_barrier(Cluster& cluster) {
  ++cluster.barrier_phase;
  cluster.arrived = 0;
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) warp.cluster_arrival = {};
    for (Thread& thread : block->threads) {
      if (thread.done) continue;
      thread.cluster_barrier = ClusterBarrierStep::kCompleted;
      if (std::exchange(thread.waits_for_cluster, false)) make_ready(thread);
    }
  }
}

static void complete_cluster_barrier_if_due(Cluster& cluster) {
  if (cluster.alive > 0 && cluster.arrived == cluster.alive) complete_cluster_barrier(cluster);
}

void cluster_arrive(bool releases, Site site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  Cluster& cluster = *self.block->cluster;
  if (self.cluster_barrier != ClusterBarrierStep::kNeither) {
    fail(site, "a second barrier.cluster.arrive without a barrier.cluster.wait in between");
  }
  Site& first = self.warp->cluster_arrival;
  if (first.op == nullptr) first = site;
  if (first.line != site.line || first.file != site.file) {
    fail(site, "lanes of warp %d reached the cluster's barrier from different lines; others came from %s",
         self.warp->id, site_text(first).c_str());
  }
  take_proxy_fence(self);
  if (releases) {
    tsan_release(&cluster.phase_order[cluster.barrier_phase % 2]);
    for (auto& barrier : self.block->mbarriers) barrier->visible_to_async_proxy = true;
  }
  self.cluster_barrier = ClusterBarrierStep::kArrived;
  ++cluster.arrived;
  complete_cluster_barrier_if_due(cluster);
  maybe_yield(site);
}

void cluster_wait(Site site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  if (self.cluster_barrier == ClusterBarrierStep::kNeither) {
    fail(site, "barrier.cluster.wait without a barrier.cluster.arrive");
  }
  if (self.cluster_barrier == ClusterBarrierStep::kArrived) {
    self.waits_for_cluster = true;
    wait_here(site);
  }
  self.cluster_barrier = ClusterBarrierStep::kNeither;
  Cluster& cluster = *self.block->cluster;
  tsan_acquire(&cluster.phase_order[(cluster.barrier_phase - 1) % 2]);
  maybe_yield(site);
}

void leave_cluster_barrier(Thread& thread) {
  Cluster& cluster = *thread.block->cluster;
  --cluster.alive;
  if (thread.cluster_barrier == ClusterBarrierStep::kArrived) --cluster.arrived;
  complete_cluster_barrier_if_due(cluster);
}

// ---- addresses in shared::cluster: a block's own addresses, or those that mapa has moved to a block's window

uint32_t map_shared_rank(uint32_t address, uint32_t rank, Site site) {
  const IgnoreScope hidden;
  if (rank >= cluster_blocks()) fail(site, "rank %u in a cluster of %u blocks", rank, cluster_blocks());
  shared_pointer(address, 1, 1, site);
  return address % kClusterWindow + (rank + 1) * kClusterWindow;
}

struct ClusterTarget {
  Block& block;
  uint32_t address;  // in that block
};

static ClusterTarget target_of(uint32_t address, const Site& site) {
  Block& own = *current_thread().block;
  if (address < kClusterWindow) return {own, address};
  Cluster& cluster = *own.cluster;
  const uint32_t rank = address / kClusterWindow - 1;
  if (rank >= cluster.blocks.size()) fail(site, "address %u belongs to no block of the cluster", address);
  Block& block = *cluster.blocks[rank];
  if (&block == &own) return {own, address % kClusterWindow};
  if (cluster.barrier_phase == 0) {
    fail(site, "block %u of the cluster may not have started: no barrier.cluster has completed", rank);
  }
  if (block.alive == 0) fail(site, "block %u of the cluster has exited", rank);
  return {block, address % kClusterWindow};
}

void load_cluster(void* destination, uint32_t address, size_t bytes, Site site) {
  maybe_yield(site);
  const ClusterTarget target = target_of(address, site);
  const uint8_t* source = shared_pointer(target.block, target.address, bytes, bytes, site);
  tsan_read(source, bytes);
  const IgnoreScope hidden;
  std::memcpy(destination, source, bytes);
}

void store_cluster(uint32_t address, const void* source, size_t bytes, Site site) {
  maybe_yield(site);
  const ClusterTarget target = target_of(address, site);
  uint8_t* destination = shared_pointer(target.block, target.address, bytes, bytes, site);
  tsan_write(destination, bytes);
  const IgnoreScope hidden;
  std::memcpy(destination, source, bytes);
}

// ---- mbarriers of other blocks

static MBarrier& remote_mbarrier(const ClusterTarget& target, const Site& site) {
  MBarrier& barrier = find_mbarrier(target.block, target.address, site);
  if (&target.block != current_thread().block && !barrier.visible_to_async_proxy) {
    fail(site, "the mbarrier of %s is not visible to the cluster: fence.mbarrier_init is missing",
         site_text(barrier.initialised_at).c_str());
  }
  return barrier;
}

void mbarrier_arrive_cluster(uint32_t address, Site site) {
  const IgnoreScope hidden;
  take_proxy_fence(current_thread());
  MBarrier& barrier = remote_mbarrier(target_of(address, site), site);
  tsan_release(&barrier);
  arrive_without_yield(barrier, 1, 0, site);
  maybe_yield(site);
}

// A late store poisons its destination at issue, as a copy does; its value is on its way and cannot change any more.
void store_async(uint32_t address, const void* source, size_t bytes, uint32_t barrier, Site site) {
  const IgnoreScope hidden;
  const ClusterTarget target = target_of(address, site), arrives_at = target_of(barrier, site);
  if (&target.block != &arrives_at.block) fail(site, "the destination and the mbarrier belong to different blocks");
  if (cluster_blocks() == 1) fail(site, "in a cluster of one block, where PTX leaves it undefined");
  uint8_t* destination = shared_pointer(target.block, target.address, bytes, bytes, site);
  MBarrier& mbarrier = remote_mbarrier(arrives_at, site);
  tsan_write(destination, bytes);
  tsan_release(&mbarrier);
  std::vector<uint8_t> value(bytes);
  std::memcpy(value.data(), source, bytes);
  Block& block = target.block;
  const auto complete = [value, destination, &block, at = arrives_at.address, site] {
    std::memcpy(destination, value.data(), value.size());
    complete_transaction(find_mbarrier(block, at, site), static_cast<int64_t>(value.size()), site);
  };
  if (completes_late()) {
    std::memset(destination, kPoisonByte, bytes);
    start_operation(block, site, complete);
  } else {
    complete();
  }
  maybe_yield(site);
}

}  // namespace fastattn::emu
