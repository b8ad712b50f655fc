// Which thread of a block runs next, and what happens when none can.
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
  Block& block = *thread.block;
  block.error = block_text(block);
  if (!block.in_operation) block.error += " thread " + std::to_string(thread.rank);
  block.error += ", " + site_text(site) + ": " + message;
  leave_to_os_thread(thread);
}

void make_ready(Thread& thread) {
  thread.waiting_at = {};
  thread.warp->ready_lanes |= 1u << thread.lane;
  thread.block->ready_warps |= 1u << thread.warp->id;
}

bool completes_late() {
  switch (config().async_mode) {
    case AsyncMode::kEager:
      return false;
    case AsyncMode::kLazy:
      return true;
    default:
      return current_thread().block->random.below(2) == 0;
  }
}

void run_operation(Block& block, size_t index) {
  const IgnoreScope hidden;
  const AsyncOperation operation = std::move(block.operations[index]);
  block.operations.erase(block.operations.begin() + static_cast<std::ptrdiff_t>(index));
  block.in_operation = true;
  operation.complete();
  block.in_operation = false;
}

// The position of the n-th set bit, counted from 0.
static int nth_set_bit(uint32_t mask, uint32_t n) {
  while (n-- > 0) mask &= mask - 1;
  return std::countr_zero(mask);
}

static int pick_warp(Block& block) {
  const uint32_t ready = block.ready_warps;
  switch (config().schedule) {
    case Schedule::kUniform:
      return nth_set_bit(ready, block.random.below(static_cast<uint32_t>(std::popcount(ready))));
    case Schedule::kPriority: {
      int best = std::countr_zero(ready);
      for (uint32_t rest = ready; rest != 0; rest &= rest - 1) {
        const int warp = std::countr_zero(rest);
        if (block.warps[warp].priority > block.warps[best].priority) best = warp;
      }
      if (block.random.below(64) == 0) block.warps[best].priority = block.random.next();
      return best;
    }
    default: {
      const uint32_t not_before_last = ready & ~((1u << block.last_warp) - 1);
      return std::countr_zero(not_before_last != 0 ? not_before_last : ready);
    }
  }
}

Thread* pick_next(Block& block) {
  if (config().async_mode == AsyncMode::kRandom) {
    while (!block.operations.empty() && block.random.below(8) == 0) {
      run_operation(block, block.random.below(static_cast<uint32_t>(block.operations.size())));
    }
  }
  while (block.ready_warps == 0) {
    if (block.operations.empty()) return nullptr;
    run_operation(block, block.random.below(static_cast<uint32_t>(block.operations.size())));
  }
  Warp& warp = block.warps[pick_warp(block)];
  const uint32_t lanes = warp.ready_lanes;
  const bool any_lane = config().schedule == Schedule::kUniform;
  const int lane = any_lane ? nth_set_bit(lanes, block.random.below(static_cast<uint32_t>(std::popcount(lanes))))
                            : std::countr_zero(lanes);
  warp.ready_lanes &= ~(1u << lane);
  if (warp.ready_lanes == 0) block.ready_warps &= ~(1u << warp.id);
  block.last_warp = warp.id;
  return warp.thread[lane];
}

void switch_to(Thread* from, Thread& to) {
  Block& block = *to.block;
  ++block.switches;
  current_view = &to;
  switch_fiber(from != nullptr ? from->fiber : block.os_thread, to.fiber, from != nullptr && from->done);
}

void leave_to_os_thread(Thread& from) {
  close_ignore_scopes();
  from.done = true;
  switch_fiber(from.fiber, from.block->os_thread, true);
  __builtin_unreachable();
}

void wait_here(const Site& site) {
  Thread& self = current_thread();
  self.waiting_at = site;
  Thread* next = pick_next(*self.block);
  if (next == nullptr) {
    report_deadlock(*self.block);
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
  if (config().schedule != Schedule::kInOrder && current_thread().block->random.below(4) == 0) yield(site);
}

// One line for each group of neighbouring threads that wait at the same place.
void report_deadlock(Block& block) {
  std::string& text = block.error;
  text = block_text(block) + ": deadlock. Waiting threads:";
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

}  // namespace fastattn::emu
