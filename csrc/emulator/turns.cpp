// Blocks that wait for one another through a counter in global memory. Blocks start in the order of their indices: a
// block may wait for smaller ones, which are done or run on another OS thread, and for no others.
#include <chrono>
#include <thread>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

void wait_for_value(const int* counter, int value, Site site) {
  const IgnoreScope hidden;
  std::atomic_ref<int> turn(*const_cast<int*>(counter));
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(config().os_threads > 1 ? 60 : 0);
  const auto is_due = [&](int count) { return config().exact_turns ? count == value : count >= value; };
  while (!is_due(turn.load(std::memory_order_acquire))) {
    if (std::chrono::steady_clock::now() >= give_up) {
      fail(site, "the counter is %d and will not become %d: a turn was skipped, or is a later block's",
           turn.load(std::memory_order_relaxed), value);
    }
    std::this_thread::yield();
  }
}

// Blocks on one OS thread run one after another, so a turn passed too early would show only between OS threads, now and
// then: it is an error in itself.
void release_add(int* counter, int value, Site site) {
  const IgnoreScope hidden;
  for (const BulkStore& store : current_thread().stores) {
    if (store.awaited) continue;
    fail(site, "this thread's %s may not be complete yet: cp.async.bulk.wait_group is missing",
         site_text(store.site).c_str());
  }
  std::atomic_ref<int>(*counter).fetch_add(value, std::memory_order_release);
}

}  // namespace fastattn::emu
