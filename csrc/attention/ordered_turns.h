// Sums whose terms come from several threads, added in one order all the same: floating-point addition is not
// associative, and gradients must not depend on timing or on the number of threads.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/spin.h"

namespace fastattn {
namespace FASTATTN_ISA {

// One counter a sum: how many of its terms have been added. A task waits only for terms of tasks with a lower number,
// which parallel_tasks has started before it, so somebody is always able to go on.
class OrderedTurns {
 public:
  // `counters` start at 0; nullptr: there is only one thread a sum, and nobody waits.
  FASTATTN_INLINE explicit OrderedTurns(int32_t* counters) : counters_(counters) {}

  FASTATTN_INLINE void wait(int64_t sum, int32_t turn) const {
    if (counters_ == nullptr) return;
    spin_until([&] { return __atomic_load_n(counters_ + sum, __ATOMIC_ACQUIRE) == turn; });
  }
  FASTATTN_INLINE void done(int64_t sum, int32_t turn) const {
    if (counters_ != nullptr) __atomic_store_n(counters_ + sum, turn + 1, __ATOMIC_RELEASE);
  }

 private:
  int32_t* counters_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
