// The memory of the CPU backward: the arrays of a call, which its threads share, and those of each thread. Both are
// taken twice, first from a cursor without memory, which counts the bytes.
#pragma once

#include "attention/attention_bwd_mask_cpu.h"
#include "attention/attention_bwd_plan_cpu.h"
#include "attention/attention_bwd_query_cpu.h"
#include "attention/attention_bwd_sink_cpu.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <typename T>
FASTATTN_INLINE T* take_zeros(ScratchCursor& cursor, int64_t count) {
  T* array = cursor.take<T>(count);
  if (array) set_zero(array, count);
  return array;
}

// Where the gradients of a key head are summed up that several tasks add to.
template <typename T>
struct KeyGradients {
  T *dk, *dv;
};

template <typename T, typename Operand>
struct SharedArrays {
  double *mask_partials, *sink_partials;
  // For OrderedTurns: a block of rows of a mask's gradient, a block of rows of dq, a tile of dk and dv.
  int32_t *mask_counters, *dq_counters, *dkv_counters;
  // Where threads share heads: the query heads of all batch entries, and, where they share them by rows, the key heads.
  QuerySide<T, Operand>* heads;
  KeyGradients<T>* keys;
};

template <typename T, typename Element, typename Operand>
FASTATTN_INLINE SharedArrays<T, Operand> take_shared(ScratchCursor& cursor,
                                                     const BackwardPlan<T, Element, Operand>& plan) {
  const AttentionBwdParams& p = plan.p;
  const int64_t heads = p.batch * p.heads, heads_kv = p.batch * p.heads_kv, row_blocks = heads * plan.most_query_blocks;
  const bool mask_takes_turns = MaskGradient<T>(p, nullptr).takes_turns();
  SharedArrays<T, Operand> shared;
  shared.mask_partials = take_zeros<double>(cursor, MaskGradient<T>::partial_count(p));
  shared.sink_partials = take_zeros<double>(cursor, SinkGradient<T>::partial_count(p, plan.most_query_blocks));
  shared.mask_counters = take_zeros<int32_t>(cursor, mask_takes_turns ? row_blocks * plan.key_blocks : 0);
  shared.dq_counters = take_zeros<int32_t>(cursor, plan.splits ? row_blocks : 0);
  shared.dkv_counters = take_zeros<int32_t>(cursor, plan.splits ? heads_kv * kMostTilesAtHand : 0);
  shared.heads = cursor.take<QuerySide<T, Operand>>(plan.splits ? heads : 0);
  shared.keys = cursor.take<KeyGradients<T>>(plan.splits ? heads_kv : 0);
  if (!plan.splits) return shared;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const BackwardPlan<T, Element, Operand> entry = plan.entry(batch);
    QueryRows(entry).take(cursor, shared.heads ? shared.heads + batch * p.heads : nullptr, p.heads);
    if (!entry.sees_all_keys) continue;
    for (int64_t pair = 0; pair < p.heads_kv; ++pair) {
      const int64_t keys = entry.p.seqlen_k;
      const KeyGradients<T> sums = {cursor.take<T>(plan.is_direct(p.dk, p.head_dim) ? 0 : keys * plan.width),
                                    cursor.take<T>(plan.is_direct(p.dv, p.head_dim_v) ? 0 : keys * plan.width_v)};
      if (shared.keys) shared.keys[batch * p.heads_kv + pair] = sums;
    }
  }
  return shared;
}

template <typename T, typename Operand>
struct ThreadArrays {
  TileBuffers<T, Operand> tile;  // the first of those at hand
  // A block of keys, with its transposed copies.
  Operand *k_t, *v_t, *k;
  T *dk, *dv;
  QuerySide<T, Operand>* heads;  // the group of query heads, unless they are shared
};

constexpr int64_t kTileElements = int64_t{kTileQueries} * kTileKeys;

template <typename T, typename Element, typename Operand>
FASTATTN_INLINE ThreadArrays<T, Operand> take_thread(ScratchCursor& cursor,
                                                     const BackwardPlan<T, Element, Operand>& plan) {
  const AttentionBwdParams& p = plan.p;
  const int64_t at_hand = max_of<int64_t>(1, min_of(plan.tiles(), plan.most_tiles_at_hand()));
  // A packed sequence may have its keys at hand where the longest one has not.
  const int64_t keys = max_of(plan.block_tiles, at_hand) * kTileKeys;
  ThreadArrays<T, Operand> arrays;
  arrays.tile.p = cursor.take<T>(at_hand * kTileElements);
  arrays.tile.ds = cursor.take<T>(at_hand * kTileElements);
  arrays.tile.slope = cursor.take<T>(p.softcap != 0 ? at_hand * kTileElements : 0);
  arrays.tile.left = cursor.take<Operand>(plan.kPairs ? kTileElements / kTerms<Operand> : 0);
  arrays.tile.ahead = nullptr;
  arrays.k_t = cursor.take<Operand>(keys * plan.depth);
  arrays.v_t = cursor.take<Operand>(keys * plan.depth_v);
  arrays.k = cursor.take<Operand>(plan.is_direct(p.k, p.head_dim) ? 0 : keys / kTerms<Operand> * plan.width);
  arrays.dk = cursor.take<T>(plan.is_direct(p.dk, p.head_dim) ? 0 : keys * plan.width);
  arrays.dv = cursor.take<T>(plan.is_direct(p.dv, p.head_dim_v) ? 0 : keys * plan.width_v);
  arrays.heads = cursor.take<QuerySide<T, Operand>>(plan.splits ? 0 : plan.group);
  if (!plan.splits) QueryRows(plan).take(cursor, arrays.heads, plan.group);
  return arrays;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
