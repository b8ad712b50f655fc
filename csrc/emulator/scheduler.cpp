// Which thread of a block or cluster runs next, and what happens when none can.
#include <cstdio>

#include "emulator/runtime.h"

namespace fastattn::emu {

Config& config() {
  static Config instance;
  return instance;
}

thread_local ThreadView* current_view __attribute__((tls_model("initial-exec"))) = nullptr;

#if defined(FASTATTN_EMULATOR_TSAN)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

static void begin_ignore() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
static void end_ignore() {
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}

IgnoreScope::IgnoreScope() {
  if (current_view != nullptr) ++current_view->ignore_scopes;
  begin_ignore();
}
IgnoreScope::~IgnoreScope() {
  if (current_view != nullptr) --current_view->ignore_scopes;
  end_ignore();
}
void close_ignore_scopes() {
  for (; current_view->ignore_scopes > 0; --current_view->ignore_scopes) end_ignore();
}
template <typename Access>
static void seen(Access&& access) {
  const int scopes = current_view->ignore_scopes;
  for (int i = 0; i < scopes; ++i) end_ignore();
  access();
  for (int i = 0; i < scopes; ++i) begin_ignore();
}
void tsan_read(const void* begin, size_t bytes) {
  seen([&] { __tsan_read_range(const_cast<void*>(begin), bytes); });
}
void tsan_write(void* begin, size_t bytes) {
  seen([&] { __tsan_write_range(begin, bytes); });
}
#endif

std::string site_text(const Site& site) {
  if (site.op == nullptr) return "(running)";
  return std::string(site.op) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string block_text(const Block& block) {
  char text[64];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
  return text;
}

void fail(const Site& site, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  Thread& thread = current_thread();
  Cluster& cluster = *thread.block->cluster;
  const bool in_operation = cluster.operating != nullptr;
  cluster.error = block_text(in_operation ? *cluster.operating : *thread.block);
  if (!in_operation) cluster.error += " thread " + std::to_string(thread.rank);
  cluster.error += ", " + site_text(site) + ": " + message;
  leave_to_os_thread(thread);
}

void make_ready(Thread& thread) {
  thread.waiting_at = {};
  Block& block = *thread.block;
  thread.warp->ready_lanes |= 1u << thread.lane;
  block.ready_warps |= 1u << thread.warp->id;
  block.cluster->ready_blocks |= 1u << block.rank;
}

bool completes_late() {
  switch (config().async_mode) {
    case AsyncMode::kEager:
      return false;
    case AsyncMode::kLazy:
      return true;
    default:
      return current_thread().block->cluster->random.below(2) == 0;
  }
}

void start_operation(Block& block, const Site& site, std::function<void()> complete) {
  block.cluster->operations.push_back({std::move(complete), site, &block});
}

static void run_any_operation(Cluster& cluster) {
  const IgnoreScope hidden;
  const size_t index = cluster.random.below(static_cast<uint32_t>(cluster.operations.size()));
  const AsyncOperation operation = std::move(cluster.operations[index]);
  cluster.operations.erase(cluster.operations.begin() + static_cast<std::ptrdiff_t>(index));
  cluster.operating = operation.block;
  operation.complete();
  cluster.operating = nullptr;
}

// The position of the n-th set bit, counted from 0.
static int nth_set_bit(uint32_t mask, uint32_t n) {
  while (n-- > 0) mask &= mask - 1;
  return std::countr_zero(mask);
}

// Under kPriority a whole block may race ahead of its cluster, as a warp may of its block.
static Block& pick_block(Cluster& cluster) {
  const uint32_t ready = cluster.ready_blocks;
  if (cluster.blocks.size() == 1) return *cluster.blocks[0];
  switch (config().schedule) {
    case Schedule::kUniform:
      return *cluster.blocks[nth_set_bit(ready, cluster.random.below(static_cast<uint32_t>(std::popcount(ready))))];
    case Schedule::kPriority: {
      Block* best = cluster.blocks[std::countr_zero(ready)];
      for (uint32_t rest = ready; rest != 0; rest &= rest - 1) {
        Block* block = cluster.blocks[std::countr_zero(rest)];
        if (block->priority > best->priority) best = block;
      }
      if (cluster.random.below(256) == 0) best->priority = cluster.random.next();
      return *best;
    }
    default: {
      const uint32_t not_before_last = ready & ~((1u << cluster.last_block) - 1);
      return *cluster.blocks[std::countr_zero(not_before_last != 0 ? not_before_last : ready)];
    }
  }
}

static int pick_warp(Block& block) {
  const uint32_t ready = block.ready_warps;
  Random& random = block.cluster->random;
  switch (config().schedule) {
    case Schedule::kUniform:
      return nth_set_bit(ready, random.below(static_cast<uint32_t>(std::popcount(ready))));
    case Schedule::kPriority: {
      int best = std::countr_zero(ready);
      for (uint32_t rest = ready; rest != 0; rest &= rest - 1) {
        const int warp = std::countr_zero(rest);
        if (block.warps[warp].priority > block.warps[best].priority) best = warp;
      }
      if (random.below(64) == 0) block.warps[best].priority = random.next();
      return best;
    }
    default: {
      const uint32_t not_before_last = ready & ~((1u << block.last_warp) - 1);
      return std::countr_zero(not_before_last != 0 ? not_before_last : ready);
    }
  }
}

Thread* pick_next(Cluster& cluster) {
  Random& random = cluster.random;
  if (config().async_mode == AsyncMode::kRandom) {
    while (!cluster.operations.empty() && random.below(8) == 0) run_any_operation(cluster);
  }
  while (cluster.ready_blocks == 0) {
    if (cluster.operations.empty()) return nullptr;
    run_any_operation(cluster);
  }
  Block& block = pick_block(cluster);
  Warp& warp = block.warps[pick_warp(block)];
  const uint32_t lanes = warp.ready_lanes;
  const bool any_lane = config().schedule == Schedule::kUniform;
  const int lane = any_lane ? nth_set_bit(lanes, random.below(static_cast<uint32_t>(std::popcount(lanes))))
                            : std::countr_zero(lanes);
  warp.ready_lanes &= ~(1u << lane);
  if (warp.ready_lanes == 0) block.ready_warps &= ~(1u << warp.id);
  if (block.ready_warps == 0) cluster.ready_blocks &= ~(1u << block.rank);
  block.last_warp = warp.id;
  cluster.last_block = block.rank;
  return warp.thread[lane];
}

void switch_to(Thread* from, Thread& to) {
  Cluster& cluster = *to.block->cluster;
  ++cluster.switches;
  current_view = &to;
  switch_fiber(from != nullptr ? from->fiber : cluster.os_thread, to.fiber, from != nullptr && from->done);
}

void leave_to_os_thread(Thread& from) {
  close_ignore_scopes();
  from.done = true;
  switch_fiber(from.fiber, from.block->cluster->os_thread, true);
  __builtin_unreachable();
}

void wait_here(const Site& site) {
  Thread& self = current_thread();
  self.waiting_at = site;
  Cluster& cluster = *self.block->cluster;
  Thread* next = pick_next(cluster);
  if (next == nullptr) {
    report_deadlock(cluster);
    leave_to_os_thread(self);
  }
  if (next != &self) switch_to(&self, *next);
}

void yield(const Site& site) {
  make_ready(current_thread());
  wait_here(site);
  current_thread().waiting_at = {};
}

void maybe_yield(const Site& site) {
  if (config().schedule == Schedule::kInOrder) return;
  if (current_thread().block->cluster->random.below(4) == 0) yield(site);
}

// One line for each group of neighbouring threads that wait at the same place.
static void describe_waiting(const Block& block, std::string& text) {
  const auto same_place = [](const Thread& a, const Thread& b) {
    return !b.done && a.waiting_at.op == b.waiting_at.op && a.waiting_at.line == b.waiting_at.line &&
           a.waiting_at.file == b.waiting_at.file;
  };
  for (size_t first = 0; first < block.threads.size();) {
    const Thread& thread = block.threads[first];
    size_t end = first + 1;
    if (!thread.done) {
      while (end < block.threads.size() && same_place(thread, block.threads[end])) ++end;
      text += "\n  thread " + std::to_string(first);
      if (end - first > 1) text += "-" + std::to_string(end - 1);
      text += " in " + site_text(thread.waiting_at);
    }
    first = end;
  }
  for (const auto& barrier : block.mbarriers) {
    if (barrier->waiting.empty()) continue;
    text += "\n  the mbarrier at shared offset " + std::to_string(barrier->address - kSharedBase) + " (" +
            site_text(barrier->initialised_at) + ") is in phase " + std::to_string(barrier->phase) + " and waits for " +
            std::to_string(barrier->pending) + " arrivals and " + std::to_string(barrier->transaction_bytes) + " bytes";
  }
}

void report_deadlock(Cluster& cluster) {
  for (const Block* block : cluster.blocks) {
    if (block->alive == 0) continue;
    cluster.error += cluster.error.empty() ? "" : "\n";
    cluster.error += block_text(*block) + ": deadlock. Waiting threads:";
    describe_waiting(*block, cluster.error);
  }
}

}  // namespace fastattn::emu
