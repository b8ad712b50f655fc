// The key side of the CPU backward: how a block of keys gets into a thread's arrays, and its gradients out of them.
#pragma once

#include <type_traits>

#include "attention/attention_bwd_memory_cpu.h"
#include "attention/attention_bwd_plan_cpu.h"
#include "attention/attention_operand_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Makes the KeySide of blocks of keys of one batch entry, of which `plan` is.
template <typename T, typename Element, typename Operand>
class KeyRows {
  using Plan = BackwardPlan<T, Element, Operand>;
  using Keys = KeySide<T, Operand>;

 public:
  FASTATTN_INLINE explicit KeyRows(const Plan& plan) : plan_(plan), p_(plan.p) {}

  // The first tile of `keys` keys from key0 on, copied where that is needed. `shared`: where tasks add up gradients
  // that share a key head by rows.
  FASTATTN_INLINE Keys prepare(const ThreadArrays<T, Operand>& arrays, const KeyGradients<T>* shared, int64_t batch,
                               int64_t head_kv, int64_t key0, int keys) const {
    const int head_dim = static_cast<int>(p_.head_dim), head_dim_v = static_cast<int>(p_.head_dim_v);
    const Element* k = row_of<Element>(p_.k, batch, head_kv, key0);
    const Element* v = row_of<Element>(p_.v, batch, head_kv, key0);
    for (int key = 0; key < keys; key += kTileKeys) {
      const int in_tile = min_of(kTileKeys, keys - key);
      pack_keys(arrays.k_t + key * plan_.depth, k + key * p_.k.stride_row, p_.k.stride_row, in_tile, head_dim);
      pack_keys(arrays.v_t + key * plan_.depth_v, v + key * p_.v.stride_row, p_.v.stride_row, in_tile, head_dim_v);
    }
    const KeyGradients<T> sums = shared ? *shared : KeyGradients<T>{arrays.dk, arrays.dv};
    Keys first{arrays.k_t, arrays.v_t, {arrays.k, plan_.width}, {sums.dk, plan_.width}, {sums.dv, plan_.width_v}};
    if constexpr (std::is_same_v<T, Element>) {
      if (plan_.is_direct(p_.k, p_.head_dim)) first.k.data = k;
      if (plan_.is_direct(p_.dk, p_.head_dim)) first.dk.data = row_of<T>(p_.dk, batch, head_kv, key0);
      if (plan_.is_direct(p_.dv, p_.head_dim_v)) first.dv.data = row_of<T>(p_.dv, batch, head_kv, key0);
    }
    if (!plan_.is_direct(p_.k, p_.head_dim)) {
      pack_right(arrays.k, plan_.width, k, p_.k.stride_row, keys, head_dim);
    }
    return first;
  }

  // The tile that starts at `key` of the block.
  FASTATTN_INLINE Keys tile_at(const Keys& first, int64_t key) const {
    return {first.k_t + key * plan_.depth,
            first.v_t + key * plan_.depth_v,
            {first.k.data + key / kTerms<Operand> * plan_.width, plan_.width},
            {first.dk.data + key * plan_.width, plan_.width},
            {first.dv.data + key * plan_.width_v, plan_.width_v}};
  }

  // Where no tile overwrites all of the gradients before others add to them.
  FASTATTN_INLINE void clear(const Keys& first, int keys) const {
    set_zero(first.dk.data, keys * plan_.width);
    set_zero(first.dv.data, keys * plan_.width_v);
  }

  FASTATTN_INLINE void store(const Keys& first, int64_t batch, int64_t head_kv, int64_t key0, int keys) const {
    if (!plan_.is_direct(p_.dk, p_.head_dim)) {
      store_rows<T>(row_of<Element>(p_.dk, batch, head_kv, key0), p_.dk.stride_row,
                    Rows<const T>{first.dk.data, plan_.width}, keys, static_cast<int>(p_.head_dim));
    }
    if (!plan_.is_direct(p_.dv, p_.head_dim_v)) {
      store_rows<T>(row_of<Element>(p_.dv, batch, head_kv, key0), p_.dv.stride_row,
                    Rows<const T>{first.dv.data, plan_.width_v}, keys, static_cast<int>(p_.head_dim_v));
    }
  }

 private:
  const Plan& plan_;
  const AttentionBwdParams& p_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
