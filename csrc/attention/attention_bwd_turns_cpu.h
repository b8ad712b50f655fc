// The order in which tasks of the CPU backward add to what they share: always the same, whatever the threads do.
#pragma once

#include "attention/attention_bwd_mask_cpu.h"
#include "attention/attention_bwd_memory_cpu.h"
#include "attention/attention_bwd_plan_cpu.h"
#include "attention/ordered_turns.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The turns of one block of rows that meets one block of keys. Threads that share a head work on different keys and
// meet in dq, or on different rows and meet in dk and dv, tile by tile. Heads that share a mask meet in its gradient.
class BackwardTurns {
 public:
  // `block` of keys; `rows` counts the blocks of rows of the query heads that share key head head_kv.
  template <typename T, typename Element, typename Operand>
  FASTATTN_INLINE BackwardTurns(const BackwardPlan<T, Element, Operand>& plan, const SharedArrays<T, Operand>& shared,
                                const MaskGradient<T>& mask, int64_t batch, int64_t head_kv, int64_t block,
                                int64_t rows)
      : dq_turn_(static_cast<int32_t>(block)), dkv_turn_(static_cast<int32_t>(rows)) {
    const int64_t head = head_kv * plan.group + rows / plan.query_blocks;
    query_block_ = rows % plan.query_blocks;
    mask_turn_ = mask.turn(batch, head);
    if (mask.takes_turns()) {
      const int64_t place = mask.place(batch, head) * plan.key_blocks + block;
      mask_ = OrderedTurns(shared.mask_counters + place * plan.query_blocks);
    }
    if (plan.splits && plan.sees_all_keys) {
      dkv_ = OrderedTurns(shared.dkv_counters + (batch * plan.p.heads_kv + head_kv) * kMostTilesAtHand);
    } else if (plan.splits) {
      dq_ = OrderedTurns(shared.dq_counters + (batch * plan.p.heads + head) * plan.most_query_blocks);
    }
  }

  FASTATTN_INLINE void wait_mask() const { mask_.wait(query_block_, mask_turn_); }
  FASTATTN_INLINE void wait_dq() const { dq_.wait(query_block_, dq_turn_); }
  FASTATTN_INLINE void wait_dkv(int tile) const { dkv_.wait(tile, dkv_turn_); }
  FASTATTN_INLINE void done_mask() const { mask_.done(query_block_, mask_turn_); }
  FASTATTN_INLINE void done_dq() const { dq_.done(query_block_, dq_turn_); }
  FASTATTN_INLINE void done_dkv(int tile) const { dkv_.done(tile, dkv_turn_); }

 private:
  OrderedTurns mask_{nullptr}, dq_{nullptr}, dkv_{nullptr};
  int64_t query_block_;
  int32_t mask_turn_, dq_turn_, dkv_turn_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
