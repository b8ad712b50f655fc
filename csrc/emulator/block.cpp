// The life of a block, a cluster and a grid: every thread becomes a fiber, clusters run one after another on each OS
// thread, the blocks of one together.
#include <atomic>
#include <mutex>
#include <thread>

#include "emulator/launch.h"
#include "emulator/memory.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

static std::atomic<uint64_t> last_switches{0};
static std::atomic<uint64_t> launch_count{0};
uint64_t switches_of_last_launch() { return last_switches; }
uint64_t launches() { return launch_count; }

const char* keep_error(std::string text) {
  static thread_local std::string kept;
  kept = std::move(text);
  return kept.empty() ? nullptr : kept.c_str();
}

// What is still in flight when the last thread of a block exits would write to memory that is no longer its own.
static void end_block(const Block& block) {
  Cluster& cluster = *block.cluster;
  for (const AsyncOperation& operation : cluster.operations) {
    if (operation.block != &block || !cluster.error.empty()) continue;
    cluster.error = block_text(block) + ": the block ended before " + site_text(operation.site) + " had completed";
  }
}

// The entry function of every fiber. Never returns: the last thing it does is to continue another one.
static void run_thread() {
  Thread& self = current_thread();
  Block& block = *self.block;
  Cluster& cluster = *block.cluster;
  enter_fiber(cluster.os_thread);
  tsan_acquire(&cluster.body);
  cluster.body();
  {
    const IgnoreScope hidden;
    take_proxy_fence(self);
    check_copies_done(self);
    check_stores_read(self);
    check_wgmmas_done(self);
  }
  tsan_release(&cluster);
  self.done = true;
  leave_cluster_barrier(self);
  if (--block.alive == 0) end_block(block);
  const bool goes_on = cluster.alive > 0 && cluster.error.empty();
  Thread* next = goes_on ? pick_next(cluster) : nullptr;
  if (next == nullptr) {
    if (goes_on) report_deadlock(cluster);
    leave_to_os_thread(self);
  }
  switch_to(&self, *next);
  __builtin_unreachable();
}

static size_t shared_limit(SharedMemory shared) {
  return shared.asks_for_more ? config().max_shared_bytes : kUnaskedSharedBytes;
}

// A block, and everything it reuses from one of its lives to the next.
class BlockState {
 public:
  BlockState(Cluster& cluster, uint32_t rank, dim3 grid, dim3 block, SharedMemory shared)
      : shared_(kStaticSharedBytes + shared.dynamic_bytes), async_view_(kStaticSharedBytes + shared.dynamic_bytes) {
    block_.cluster = &cluster;
    block_.rank = rank;
    block_.grid_dim = grid;
    block_.block_dim = block;
    block_.shared = shared_.data();
    block_.async_view = async_view_.data();
    block_.shared_bytes = kStaticSharedBytes + shared.dynamic_bytes;
    block_.shared_limit = shared_limit(shared);
    cluster.blocks.push_back(&block_);
    make_threads(static_cast<int>(block.x * block.y * block.z));
  }

  ~BlockState() {
    for (Thread& thread : block_.threads) release_fiber(thread.fiber, !thread.done);
  }
  BlockState(const BlockState&) = delete;
  BlockState& operator=(const BlockState&) = delete;

  void reset(uint3 index) {
    block_.index = index;
    prepare_shared(block_, shared_.bytes());
    block_.alive = static_cast<int>(block_.threads.size());
    block_.ready_warps = 0;
    block_.last_warp = 0;
    if (block_.cluster->blocks.size() > 1) block_.priority = block_.cluster->random.next();
    block_.spare_registers = 0;
    block_.waiting_for_registers.clear();
    for (Barrier& barrier : block_.barriers) barrier = {};
    block_.mbarriers.clear();
    block_.unfinished_stores.clear();
    for (Warp& warp : block_.warps) reset_warp(warp);
    for (Thread& thread : block_.threads) reset_thread(thread);
  }

  // Empty, or what is wrong with the block that has ended.
  std::string end_problem() {
    std::string problem = red_zone_damage(block_, shared_.bytes());
    if (problem.empty()) problem = wgmma_disagreement(block_);
    if (problem.empty()) problem = setmaxnreg_disagreement(block_);
    return problem.empty() ? "" : block_text(block_) + ": " + problem;
  }

  void finish_stores() {
    for (auto& write : block_.unfinished_stores) write();
  }

 private:
  void make_threads(int count) {
    block_.warps.resize((count + kWarpSize - 1) / kWarpSize);
    block_.threads.resize(count);
    for (int rank = 0; rank < count; ++rank) {
      Thread& thread = block_.threads[rank];
      Warp& warp = block_.warps[rank / kWarpSize];
      stacks_.push_back(std::make_unique<GuardedMemory>(kStackBytes));
      thread.rank = rank;
      thread.lane = rank % kWarpSize;
      thread.warp = &warp;
      thread.block = &block_;
      const unsigned x = block_.block_dim.x, y = block_.block_dim.y;
      thread.thread_index = {rank % x, rank / x % y, rank / x / y};
      thread.block_dim = block_.block_dim;
      thread.grid_dim = block_.grid_dim;
      thread.dynamic_shared = block_.shared + kStaticSharedBytes;
      warp.block = &block_;
      warp.id = rank / kWarpSize;
      warp.lanes |= 1u << thread.lane;
      warp.thread[thread.lane] = &thread;
    }
  }

  void reset_warp(Warp& warp) {
    warp.ready_lanes = 0;
    warp.priority = block_.cluster->random.next();
    for (Rendezvous& meeting : warp.rendezvous) meeting = {};
    warp.wgmmas.clear();
    warp.wgmma_group = 0;
    warp.wgmma_fenced = false;
    warp.wgmma_history.clear();
    warp.cluster_arrival = {};
    warp.max_registers.clear();
  }

  void reset_thread(Thread& thread) {
    thread.block_index = block_.index;
    thread.done = false;
    thread.wants_proxy_fence = false;
    thread.cluster_barrier = ClusterBarrierStep::kNeither;
    thread.waits_for_cluster = false;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.stores.clear();
    thread.store_group = 0;
    prepare_fiber(thread.fiber, stacks_[thread.rank]->data(), kStackBytes, run_thread);
    make_ready(thread);
  }

  GuardedMemory shared_, async_view_;
  std::vector<std::unique_ptr<GuardedMemory>> stacks_;
  Block block_;
};

// How a grid is cut into clusters. Ranks in a cluster, and clusters, are numbered with x fastest.
struct ClusteredGrid {
  dim3 grid, cluster;

  unsigned blocks() const { return cluster.x * cluster.y * cluster.z; }
  uint64_t clusters() const { return uint64_t{grid.x} * grid.y * grid.z / blocks(); }
  uint3 block_index(uint64_t i, unsigned rank) const {
    const unsigned along_x = grid.x / cluster.x, along_y = grid.y / cluster.y;
    return {static_cast<unsigned>(i % along_x) * cluster.x + rank % cluster.x,
            static_cast<unsigned>(i / along_x % along_y) * cluster.y + rank / cluster.x % cluster.y,
            static_cast<unsigned>(i / along_x / along_y) * cluster.z + rank / cluster.x / cluster.y};
  }
};

// One OS thread's blocks, a cluster after the other.
class ClusterRunner {
 public:
  ClusterRunner(const ClusteredGrid& grid, dim3 block, SharedMemory shared, const std::function<void()>& body)
      : grid_(grid) {
    cluster_.body = body;
    for (unsigned rank = 0; rank < grid.blocks(); ++rank) {
      states_.push_back(std::make_unique<BlockState>(cluster_, rank, grid.grid, block, shared));
    }
    threads_ = static_cast<int>(block.x * block.y * block.z * grid.blocks());
  }

  std::string run(uint64_t index, uint64_t seed) {
    reset(index, seed);
    adopt_os_thread(cluster_.os_thread);
    tsan_release(&cluster_.body);
    switch_to(nullptr, *pick_next(cluster_));
    tsan_acquire(&cluster_);
    current_view = nullptr;
    for (auto& state : states_) {
      if (cluster_.error.empty()) cluster_.error = state->end_problem();
    }
    if (cluster_.error.empty()) {
      for (auto& state : states_) state->finish_stores();
    }
    return cluster_.error;
  }

  uint64_t switches() const { return cluster_.switches; }

 private:
  void reset(uint64_t index, uint64_t seed) {
    cluster_.random.state = seed;
    cluster_.ready_blocks = 0;
    cluster_.last_block = 0;
    cluster_.alive = threads_;
    cluster_.arrived = 0;
    cluster_.barrier_phase = 0;
    cluster_.operations.clear();
    cluster_.error.clear();
    cluster_.operating = nullptr;
    for (unsigned rank = 0; rank < grid_.blocks(); ++rank) states_[rank]->reset(grid_.block_index(index, rank));
  }

  ClusteredGrid grid_;
  int threads_ = 0;
  Cluster cluster_;
  std::vector<std::unique_ptr<BlockState>> states_;
};

static std::string launch_problem(dim3 grid, dim3 cluster, dim3 block, SharedMemory shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxWarps * kWarpSize) {
    return "launch: a block has 1 to 1024 threads, not " + std::to_string(threads);
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return "launch: a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
           std::to_string(grid.z) + ") blocks; the limits are 1 and (2^31 - 1, 65535, 65535)";
  }
  if (shared.dynamic_bytes > shared_limit(shared)) {
    return "launch: " + std::to_string(shared.dynamic_bytes) + " bytes of dynamic shared memory; the limit is " +
           std::to_string(shared_limit(shared));
  }
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks < 1 || blocks > kMaxClusterBlocks) {
    return "launch: a cluster has 1 to " + std::to_string(kMaxClusterBlocks) + " blocks, not " + std::to_string(blocks);
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return "launch: the grid is not a whole number of clusters";
  }
  return "";
}

std::string run_grid(dim3 grid, dim3 cluster, dim3 block, SharedMemory shared, const std::function<void()>& body) {
  std::string problem = launch_problem(grid, cluster, block, shared);
  if (!problem.empty()) return problem;
  ++launch_count;
  const ClusteredGrid clustered{grid, cluster};
  const uint64_t clusters = clustered.clusters();
  std::atomic<uint64_t> next_cluster{0}, switches{0};
  std::mutex mutex;
  std::atomic<bool> failed{false};

  const auto work = [&] {
    ClusterRunner runner(clustered, block, shared, body);
    for (uint64_t i; !failed && (i = next_cluster++) < clusters;) {
      const uint64_t seed = (config().seed + 1) * 0x9E3779B97F4A7C15ull + i * 0xD1B54A32D192ED03ull;
      std::string error = runner.run(i, seed | 1);
      if (error.empty()) continue;
      const std::lock_guard lock(mutex);
      if (problem.empty()) problem = std::move(error);
      failed = true;
    }
    switches += runner.switches();
  };
  const uint64_t workers = std::min<uint64_t>(static_cast<uint64_t>(std::max(config().os_threads, 1)), clusters);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < workers; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  }
  last_switches = switches.load();
  return problem;
}

}  // namespace fastattn::emu
