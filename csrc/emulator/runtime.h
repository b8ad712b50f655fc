// The state of one emulated block, and what instructions are built from. Kernels do not include this: they see cuda.h.
//
// An OS thread runs one cluster of blocks at a time; without clusters that is one block. Each thread is a fiber that
// runs until an instruction has to wait; that instruction then picks the next ready fiber and switches to it directly.
#pragma once

#include <cstdarg>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/config.h"
#include "emulator/cuda.h"
#include "emulator/fiber.h"
#include "emulator/sanitizers.h"

namespace fastattn::emu {

struct Block;
struct Cluster;
struct Warp;

// xorshift64*: small, and the same on every machine.
struct Random {
  uint64_t state = 1;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 33) % bound); }
};

// One cp.async of one thread, kept until a wait covers it.
struct CopyAsync {
  uint8_t* destination;
  const uint8_t* source;
  int bytes;        // 4, 8 or 16
  int valid_bytes;  // read from the source; the rest becomes zero
  int group;
  bool delivered;
  Site site;
};

// A bulk store of one thread: shared memory is read by wait_group.read, global memory written by wait_group at latest.
struct BulkStore {
  std::function<void()> read_source;
  std::function<void()> write_destination;
  int group;
  Site site;
  bool awaited = false;  // by wait_group, not only wait_group.read
};

// Where a thread stands between barrier.cluster.arrive and barrier.cluster.wait.
enum class ClusterBarrierStep : int { kNeither, kArrived, kCompleted };

struct Thread : ThreadView {
  Fiber fiber;
  int rank = 0;  // in the block
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool done = false;
  Site waiting_at;  // op is null while the thread is ready or running
  bool wants_proxy_fence = false;
  ClusterBarrierStep cluster_barrier = ClusterBarrierStep::kNeither;
  bool waits_for_cluster = false;
  std::vector<CopyAsync> copies;
  int copy_group = 0;
  std::vector<BulkStore> stores;
  int store_group = 0;
};

// Where the lanes of a warp meet for one instruction. Disjoint masks may be in flight at once, hence four of them.
struct Rendezvous {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  Site site;
  bool wants_proxy_fence = false;
  void* arguments[kWarpSize] = {};
};

// One warp's rows of a wgmma.mma_async that is in flight; see wgmma.cpp.
struct WgmmaInFlight;

struct Warp {
  Block* block = nullptr;
  int id = 0;
  uint32_t lanes = 0;  // mask of the lanes that exist
  uint32_t ready_lanes = 0;
  uint64_t priority = 0;
  Thread* thread[kWarpSize] = {};
  Rendezvous rendezvous[4];
  std::vector<std::shared_ptr<WgmmaInFlight>> wgmmas;
  int wgmma_group = 0;
  bool wgmma_fenced = false;
  std::vector<uint64_t> wgmma_history;  // one hash an instruction: the four warps of a warpgroup must agree
  Site cluster_arrival;                 // in the current phase of the cluster's barrier
  std::vector<int> max_registers;       // of a thread, after each setmaxnreg
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  bool wants_proxy_fence = false;
  Site warp_site[kMaxWarps];  // in the current phase
  std::vector<Thread*> waiting;
};

// The state behind the eight opaque bytes of an mbarrier.
struct MBarrier {
  uint32_t address = 0;
  uint32_t phase = 0;
  int expected = 0;
  int pending = 0;
  int64_t transaction_bytes = 0;
  bool visible_to_async_proxy = false;  // and to the other blocks of the cluster
  std::vector<Thread*> waiting;
  Site initialised_at;
};

// An operation that completes by itself: the scheduler runs one when it likes, or when nothing else can run.
struct AsyncOperation {
  std::function<void()> complete;
  Site site;
  Block* block;  // whose memory it writes
};

struct StaticSlot {
  const void* key;
  uint8_t* memory;
  size_t bytes;
};

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  uint3 index{};
  dim3 grid_dim, block_dim;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int alive = 0;
  uint32_t ready_warps = 0;
  int last_warp = 0;
  uint64_t priority = 0;

  // Shared memory as threads see it, and as the asynchronous proxy (TMA, wgmma) sees it. An ordinary store reaches the
  // second only through fence.proxy.async; TMA writes both.
  uint8_t* shared = nullptr;
  uint8_t* async_view = nullptr;
  size_t shared_bytes = 0;  // static part, then dynamic part
  size_t shared_limit = 0;  // of what is declared as static and the dynamic part
  std::vector<StaticSlot> static_slots;
  size_t static_bytes = 0;
  std::vector<const uint8_t*> red_zones;  // behind static arrays

  int spare_registers = 0;  // given back, for all warps alike
  std::vector<Thread*> waiting_for_registers;

  Barrier barriers[16];
  std::vector<std::unique_ptr<MBarrier>> mbarriers;
  std::vector<std::function<void()>> unfinished_stores;  // read from shared memory, not yet written to global memory
};

// Blocks that live at once and reach each other's shared memory, and what their common OS thread needs to run them.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint32_t ready_blocks = 0;
  uint32_t last_block = 0;

  // barrier.cluster: complete when every thread that has not exited has arrived.
  int alive = 0, arrived = 0;
  uint32_t barrier_phase = 0;
  // What ThreadSanitizer knows a phase by: a thread may arrive in the next one before another has left this one.
  char phase_order[2] = {};

  std::vector<AsyncOperation> operations;
  Random random;
  Fiber os_thread;
  std::function<void()> body;
  std::string error;
  Block* operating = nullptr;  // the scheduler completes an operation of this block: errors belong to no thread
  uint64_t switches = 0;
};

inline Thread& current_thread() { return *static_cast<Thread*>(current_view); }

// ---- errors: the text is kept, the block abandoned where it stands
[[noreturn]] void fail(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string site_text(const Site& site);
std::string block_text(const Block& block);

// ---- scheduler.cpp
void make_ready(Thread& thread);
void wait_here(const Site& site);     // until some other thread or operation calls make_ready
void yield(const Site& site);         // to any ready thread, this one included
void maybe_yield(const Site& site);   // now and then, in the random schedules
Thread* pick_next(Cluster& cluster);  // null if nothing can ever run again
void switch_to(Thread* from, Thread& to);
[[noreturn]] void leave_to_os_thread(Thread& from);
void report_deadlock(Cluster& cluster);
bool completes_late();  // draws whether the next asynchronous operation is delivered late
void start_operation(Block& block, const Site& site, std::function<void()> complete);  // completes by itself, later

// ---- memory.cpp
// NaN in fp32, fp16 and bf16, -1 in integers: what shared memory holds at first, and while a copy into it is in flight.
constexpr uint8_t kPoisonByte = 0xFF;
constexpr uint8_t kRedZoneByte = 0xC5;
constexpr size_t kRedZoneBytes = 64;
void prepare_shared(Block& block, size_t mapped_bytes);
std::string red_zone_damage(Block& block, size_t mapped_bytes);
uint8_t* shared_pointer(const Block& block, uint32_t address, size_t bytes, size_t alignment, const Site& site);
uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const Site& site);  // of the running thread
void check_global(const void* pointer, size_t bytes, const Site& site, const char* access);
void poison(Block& block, uint32_t address, size_t bytes, bool async_view_too);

// ---- sync.cpp
void publish_to_async_proxy(Block& block);
void take_proxy_fence(Thread& thread);  // carries out a pending fence.proxy.async

// A collective instruction of the lanes in `mask`: the last lane to arrive carries it out for all of them.
Rendezvous* enter_collective(uint32_t mask, const Site& site, void* argument, bool orders_memory);
void leave_collective(Rendezvous& rendezvous, bool orders_memory);

template <typename Argument, typename Execute>
void collective(uint32_t mask, const Site& site, Argument& argument, Execute&& execute, bool orders_memory = false) {
  const IgnoreScope hidden;
  if (Rendezvous* meeting = enter_collective(mask, site, &argument, orders_memory)) {
    execute(reinterpret_cast<Argument**>(meeting->arguments), meeting->mask);
    leave_collective(*meeting, orders_memory);
  }
}

// ---- mbarrier.cpp
MBarrier& find_mbarrier(Block& block, uint32_t address, const Site& site);
MBarrier& find_mbarrier(uint32_t address, const Site& site);
void arrive_without_yield(MBarrier& barrier, int arrivals, int64_t transaction_bytes, const Site& site);
void complete_transaction(MBarrier& barrier, int64_t bytes, const Site& site);

// ---- cluster.cpp
void leave_cluster_barrier(Thread& thread);  // an exiting thread no longer counts

// ---- the asynchronous proxy's view

// Where a byte of a tile lies under a swizzle of 32, 64 or 128 bytes: address bits 4 to 6 are XORed with bits 7 to 9.
inline uint32_t swizzle_address(uint32_t address, int swizzle_bytes) {
  const uint32_t rows = swizzle_bytes == 0 ? 0 : static_cast<uint32_t>(swizzle_bytes) / 16 - 1;
  return address ^ ((address >> 7 & rows) << 4);
}

// ---- what must hold when a thread exits and when a block ends
void check_copies_done(Thread& thread);
void check_stores_read(Thread& thread);
void check_wgmmas_done(Thread& thread);
std::string wgmma_disagreement(const Block& block);
std::string setmaxnreg_disagreement(const Block& block);

}  // namespace fastattn::emu
