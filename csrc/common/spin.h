// Waiting for another thread of the same parallel region, for less time than it takes to sleep and wake.
#pragma once

#include <sched.h>

#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <typename Condition>
FASTATTN_INLINE void spin_until(Condition&& holds) {
  constexpr int kSpinsBeforeYield = 4000;
  for (int spins = 0; !holds(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    // With more threads than processors, the one that is waited for may need this one.
    if (spins >= kSpinsBeforeYield) sched_yield();
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
