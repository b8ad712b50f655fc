// The query side of the CPU backward: memory for the rows of q, dout and dq, how a block of rows gets into it, and how
// dq gets out of it.
#pragma once

#include <limits>
#include <type_traits>

#include "attention/attention_bwd_mask_cpu.h"
#include "attention/attention_bwd_plan_cpu.h"
#include "attention/attention_bwd_rows_cpu.h"
#include "attention/attention_bwd_sink_cpu.h"
#include "attention/attention_operand_cpu.h"
#include "attention/packed.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Makes the QuerySide of heads of one batch entry, of which `plan` is: take(), then, when it is known which heads these
// are, point_at_tensors(), then prepare_rows() for each block of rows.
template <typename T, typename Element, typename Operand>
class QueryRows {
  using Plan = BackwardPlan<T, Element, Operand>;
  using Head = QuerySide<T, Operand>;

 public:
  FASTATTN_INLINE explicit QueryRows(const Plan& plan) : plan_(plan), p_(plan.p) {}

  // Memory for the rows of `count` heads; with heads == nullptr it is only counted.
  FASTATTN_INLINE void take(ScratchCursor& cursor, Head* heads, int64_t count) const {
    const int64_t pairs = Plan::kPairs ? elements_for<Operand>(p_.seqlen_q) : 0;
    for (int64_t i = 0; i < count; ++i) {
      Head head;
      head.q = take_left(cursor, p_.q, p_.head_dim);
      head.dout = take_left(cursor, p_.dout, p_.head_dim_v);
      head.q_terms = {cursor.take<Operand>(pairs * plan_.width), plan_.width};
      head.dout_terms = {cursor.take<Operand>(pairs * plan_.width_v), plan_.width_v};
      head.dq = {cursor.take<T>(plan_.is_direct(p_.dq, p_.head_dim) ? 0 : p_.seqlen_q * plan_.width), plan_.width};
      head.lse = cursor.take<T>(p_.seqlen_q);
      head.dlse = cursor.take<T>(p_.seqlen_q);
      head.delta = cursor.take<T>(plan_.sees_all_keys ? 0 : p_.seqlen_q);
      if (heads) heads[i] = head;
    }
  }

  // What needs no copy is read, and written, in the tensors themselves.
  FASTATTN_INLINE void point_at_tensors(Head& head, int64_t batch, int64_t head_index) const {
    if (plan_.is_left(p_.q, p_.head_dim)) {
      head.q.data = reinterpret_cast<const Operand*>(row_of<Element>(p_.q, batch, head_index, 0));
    }
    if (plan_.is_left(p_.dout, p_.head_dim_v)) {
      head.dout.data = reinterpret_cast<const Operand*>(row_of<Element>(p_.dout, batch, head_index, 0));
    }
    if constexpr (std::is_same_v<T, Element>) {
      if (plan_.is_direct(p_.dq, p_.head_dim)) head.dq.data = row_of<T>(p_.dq, batch, head_index, 0);
    }
    if constexpr (!Plan::kPairs) {
      head.q_terms = head.q;
      head.dout_terms = head.dout;
    }
  }

  FASTATTN_INLINE void prepare_rows(const Head& head, const SinkGradient<T>& sink, const MaskGradient<T>& mask,
                                    int64_t batch, int64_t head_index, int64_t block) const {
    const int64_t row0 = block * kTileQueries;
    const int rows = static_cast<int>(min_of<int64_t>(kTileQueries, p_.seqlen_q - row0));
    const int head_dim = static_cast<int>(p_.head_dim), head_dim_v = static_cast<int>(p_.head_dim_v);
    const Element* q = row_of<Element>(p_.q, batch, head_index, row0);
    const Element* dout = row_of<Element>(p_.dout, batch, head_index, row0);
    const auto at = [&](Rows<const Operand> operand, int64_t first) __attribute__((always_inline)) {
      return const_cast<Operand*>(operand.data) + first * operand.stride;
    };
    if (!plan_.is_left(p_.q, p_.head_dim)) {
      pack_left(at(head.q, row0), head.q.stride, q, p_.q.stride_row, rows, head_dim);
    }
    if (!plan_.is_left(p_.dout, p_.head_dim_v)) {
      pack_left(at(head.dout, row0), head.dout.stride, dout, p_.dout.stride_row, rows, head_dim_v);
    }
    if constexpr (Plan::kPairs) {
      pack_right(at(head.q_terms, row0 / 2), plan_.width, q, p_.q.stride_row, rows, head_dim);
      pack_right(at(head.dout_terms, row0 / 2), plan_.width_v, dout, p_.dout.stride_row, rows, head_dim_v);
    }
    prepare_statistics(head, batch, head_index, row0, rows);
    if (!plan_.sees_all_keys) prepare_delta(head, sink, mask, batch, head_index, row0, rows);
  }

  // Where no tile overwrites all of dq before others add to it.
  FASTATTN_INLINE void clear(const Head& head, int64_t row0, int rows) const {
    set_zero(head.dq.data + row0 * plan_.width, rows * plan_.width);
  }

  FASTATTN_INLINE void store(const Head& head, int64_t batch, int64_t head_index, int64_t row0, int rows) const {
    if (plan_.is_direct(p_.dq, p_.head_dim)) return;
    store_rows<T>(row_of<Element>(p_.dq, batch, head_index, row0), p_.dq.stride_row,
                  Rows<const T>{head.dq.data + row0 * plan_.width, plan_.width}, rows, static_cast<int>(p_.head_dim));
  }

 private:
  FASTATTN_INLINE Rows<const Operand> take_left(ScratchCursor& cursor, const AttentionTensor& tensor,
                                                int64_t columns) const {
    const int64_t width = left_width<Operand>(columns);
    return {cursor.take<Operand>(plan_.is_left(tensor, columns) ? 0 : p_.seqlen_q * width), width};
  }

  FASTATTN_INLINE void prepare_statistics(const Head& head, int64_t batch, int64_t head_index, int64_t row0,
                                          int rows) const {
    const int64_t first = lse_offset(p_, batch, head_index) + row0;
    const T* lse = static_cast<const T*>(p_.lse) + first;
    const T* dlse = p_.dlse ? static_cast<const T*>(p_.dlse) + first : nullptr;
    using V = Vec<T>;
    for (int r = 0; r < rows; r += V::kLanes) {
      const int lanes = rows - r;
      const V x = V::load_partial(lse + r, lanes), dx = dlse ? V::load_partial(dlse + r, lanes) : V::zero();
      const auto sees_nothing = less(x, V::set1(std::numeric_limits<T>::lowest()));
      select(sees_nothing, V::set1(std::numeric_limits<T>::infinity()), x).store_partial(head.lse + row0 + r, lanes);
      select(sees_nothing, V::zero(), dx).store_partial(head.dlse + row0 + r, lanes);
    }
  }

  // delta = dout . out, for rows whose p and dp are not all at hand, and what follows from it: the gradients of sinks
  // and of a mask that broadcasts over keys.
  FASTATTN_INLINE void prepare_delta(const Head& head, const SinkGradient<T>& sink, const MaskGradient<T>& mask,
                                     int64_t batch, int64_t head_index, int64_t row0, int rows) const {
    alignas(64) T dots[kTileQueries];
    row_dots<Operand>(dots, row_of<Element>(p_.out, batch, head_index, row0), p_.out.stride_row,
                      row_of<Element>(p_.dout, batch, head_index, row0), p_.dout.stride_row, rows,
                      static_cast<int>(p_.head_dim_v),
                      chain_length(p_.seqlen_q, p_.seqlen_k, max_of(p_.head_dim, p_.head_dim_v)));
    double dsink = 0;
    for (int64_t r = row0; r < row0 + rows; ++r) {
      const T delta = head.lse[r] < __builtin_inf() ? dots[r - row0] : T(0);
      head.delta[r] = delta;
      const double p_sink = sink.probability(head_index, head.lse[r]), dlse = head.dlse[r];
      dsink += p_sink * (dlse - delta);
      mask.set_row(batch, head_index, r, (1 - p_sink) * dlse + p_sink * delta);
    }
    sink.set(batch, head_index, row0 / kTileQueries, dsink);
  }

  const Plan& plan_;
  const AttentionBwdParams& p_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
