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
  while (turn.load(std::memory_order_acquire) != value) {
    if (std::chrono::steady_clock::now() >= give_up) {
      fail(site, "the counter is %d and will not become %d: a turn was skipped, or is a later block's",
           turn.load(std::memory_order_relaxed), value);
    }
    std::this_thread::yield();
  }
}

void release_add(int* counter, int value) {
  const IgnoreScope hidden;
  std::atomic_ref<int>(*counter).fetch_add(value, std::memory_order_release);
}

}  // namespace fastattn::emu
