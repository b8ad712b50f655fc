// The life of a block, and of a grid: every thread becomes a fiber, blocks run one after another on each OS thread.
#include <atomic>
#include <mutex>
#include <thread>

#include "emulator/launch.h"
#include "emulator/memory.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

static std::atomic<uint64_t> last_switches{0};
uint64_t switches_of_last_launch() { return last_switches; }

const char* keep_error(std::string text) {
  static thread_local std::string kept;
  kept = std::move(text);
  return kept.empty() ? nullptr : kept.c_str();
}

// The entry function of every fiber. Never returns: the last thing it does is to continue another one.
static void run_thread() {
  Thread& self = current_thread();
  Block& block = *self.block;
  enter_fiber(block.os_thread);
  tsan_acquire(&block);
  block.body();
  {
    const IgnoreScope hidden;
    take_proxy_fence(self);
    check_copies_done(self);
    check_stores_read(self);
    check_wgmmas_done(self);
  }
  tsan_release(&block);
  self.done = true;
  --block.alive;
  Thread* next = block.alive > 0 ? pick_next(block) : nullptr;  // what is still in flight after the last is an error
  if (next == nullptr) {
    if (block.alive > 0) report_deadlock(block);
    leave_to_os_thread(self);
  }
  switch_to(&self, *next);
  __builtin_unreachable();
}

// Everything a worker reuses from block to block.
class BlockRunner {
 public:
  BlockRunner(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body)
      : shared_(kStaticSharedBytes + dynamic_shared_bytes), async_view_(kStaticSharedBytes + dynamic_shared_bytes) {
    block_.grid_dim = grid;
    block_.block_dim = block;
    block_.shared = shared_.data();
    block_.async_view = async_view_.data();
    block_.shared_bytes = kStaticSharedBytes + dynamic_shared_bytes;
    block_.body = body;
    make_threads(static_cast<int>(block.x * block.y * block.z));
  }

  ~BlockRunner() {
    for (Thread& thread : block_.threads) release_fiber(thread.fiber, !thread.done);
  }

  std::string run(uint3 index, uint64_t seed) {
    block_.index = index;
    block_.random.state = seed;
    reset();
    adopt_os_thread(block_.os_thread);
    tsan_release(&block_);
    switch_to(nullptr, *pick_next(block_));
    tsan_acquire(&block_);
    current_view = nullptr;
    if (block_.error.empty()) {
      check_end();
      for (auto& write : block_.unfinished_stores) write();
    }
    return block_.error;
  }

  uint64_t switches() const { return block_.switches; }

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

  void reset() {
    prepare_shared(block_, shared_.bytes());
    block_.alive = static_cast<int>(block_.threads.size());
    block_.ready_warps = 0;
    block_.last_warp = 0;
    for (Barrier& barrier : block_.barriers) barrier = {};
    block_.mbarriers.clear();
    block_.operations.clear();
    block_.unfinished_stores.clear();
    block_.error.clear();
    block_.in_operation = false;
    for (Warp& warp : block_.warps) reset_warp(warp);
    for (Thread& thread : block_.threads) {
      thread.block_index = block_.index;
      thread.done = false;
      thread.wants_proxy_fence = false;
      thread.copies.clear();
      thread.copy_group = 0;
      thread.stores.clear();
      thread.store_group = 0;
      prepare_fiber(thread.fiber, stacks_[thread.rank]->data(), kStackBytes, run_thread);
      make_ready(thread);
    }
  }

  void reset_warp(Warp& warp) {
    warp.ready_lanes = 0;
    warp.priority = block_.random.next();
    for (Rendezvous& meeting : warp.rendezvous) meeting = {};
    warp.wgmmas.clear();
    warp.wgmma_group = 0;
    warp.wgmma_fenced = false;
    warp.wgmma_history.clear();
  }

  void check_end() {
    std::string problem = red_zone_damage(block_, shared_.bytes());
    if (problem.empty()) problem = wgmma_disagreement(block_);
    if (problem.empty() && !block_.operations.empty()) {
      problem = "the block ended before " + site_text(block_.operations[0].site) + " had completed";
    }
    if (!problem.empty()) block_.error = block_text(block_) + ": " + problem;
  }

  GuardedMemory shared_, async_view_;
  std::vector<std::unique_ptr<GuardedMemory>> stacks_;
  Block block_;
};

static std::string launch_problem(dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxWarps * kWarpSize) {
    return "launch: a block has 1 to 1024 threads, not " + std::to_string(threads);
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return "launch: a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
           std::to_string(grid.z) + ") blocks; the limits are 1 and (2^31 - 1, 65535, 65535)";
  }
  if (dynamic_shared_bytes > kMaxSharedBytes) {
    return "launch: " + std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory; the limit is " +
           std::to_string(kMaxSharedBytes);
  }
  return "";
}

std::string run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body) {
  std::string problem = launch_problem(grid, block, dynamic_shared_bytes);
  if (!problem.empty()) return problem;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::atomic<uint64_t> next_block{0}, switches{0};
  std::mutex mutex;
  std::atomic<bool> failed{false};

  const auto work = [&] {
    BlockRunner runner(grid, block, dynamic_shared_bytes, body);
    for (uint64_t i; !failed && (i = next_block++) < blocks;) {
      const uint3 index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                           static_cast<unsigned>(i / grid.x / grid.y)};
      const uint64_t seed = (config().seed + 1) * 0x9E3779B97F4A7C15ull + i * 0xD1B54A32D192ED03ull;
      std::string error = runner.run(index, seed | 1);
      if (error.empty()) continue;
      const std::lock_guard lock(mutex);
      if (problem.empty()) problem = std::move(error);
      failed = true;
    }
    switches += runner.switches();
  };
  const uint64_t workers = std::min<uint64_t>(static_cast<uint64_t>(std::max(config().os_threads, 1)), blocks);
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
