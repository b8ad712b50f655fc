// The attention probabilities of a tile, from lse: what backward and attention_weights have in common.
#pragma once

#include "attention/attention_gemm_cpu.h"
#include "attention/attention_scores_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Where a tile is and what its rows see.
struct TilePlace {
  int64_t row0, key0;
  int rows, keys;
  // One word a row; visible == nullptr: every key is. kept == nullptr: no dropout.
  const uint64_t *visible, *kept;
  // The backward's tile is the first to write these rows of dq, these keys of dk and dv: it overwrites them.
  bool starts_dq, starts_dkv;
};

// p = e^(factor * dot + mask - lse) where visible, else 0. In base 2 the rounding of factor * log2(e) and of
// lse * log2(e) would cost as much accuracy again.
template <typename T, bool kPartial, bool kMask = false>
FASTATTN_INLINE void probabilities(T* p, const T* lse, T factor, const TilePlace& place, const MaskRows<T>& mask = {}) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  for (int r = 0; r < place.rows; ++r, p += kTileKeys) {
    const V minus_lse = V::set1(-lse[r]);
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      V x;
      if constexpr (kMask) {
        x = exp(fma(V::load(p + key), scale, V::load(mask.row(r) + key)) + minus_lse);
      } else {
        x = exp(fma(V::load(p + key), scale, minus_lse));
      }
      if constexpr (kPartial) {
        x = select(V::mask_from_bits(static_cast<uint32_t>(place.visible[r] >> key)), x, V::zero());
      }
      x.store(p + key);
    }
  }
}

template <typename T>
FASTATTN_INLINE void drop(T* dropped, const T* p, T keep_scale, const TilePlace& place) {
  using V = Vec<T>;
  for (int r = 0; r < place.rows; ++r) {
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      const auto kept = V::mask_from_bits(static_cast<uint32_t>(place.kept[r] >> key));
      const int at = r * kTileKeys + key;
      select(kept, V::load(p + at) * V::set1(keep_scale), V::zero()).store(dropped + at);
    }
  }
}

// p (kTileKeys columns a row) = the probabilities of q, rows of one head from place.row0 on, over the keys of k_t; with
// softcap, `slope` gets the derivative of the capping. `limits` must allow for every visible element, and with softcap
// for all.
template <typename T, bool kPartial, typename Operand>
FASTATTN_INLINE void recompute_probabilities(T* p, T* slope, const HeadScores<T>& scores, Rows<const Operand> q,
                                             const Operand* k_t, const T* lse, const TilePlace& place,
                                             const StripLimits& limits) {
  const MaskRows<T> mask = scores.mask_rows(place.row0, place.key0);
  mask.prefetch(place.rows);
  gemm<T, Operand>({p, kTileKeys}, {q.data, q.stride, 1}, {k_t, kTileKeys}, place.rows, kTileKeys, false, limits);
  if (!scores.has_terms()) return probabilities<T, kPartial>(p, lse, scores.dot_factor, place);
  if (mask.data) return probabilities<T, kPartial, true>(p, lse, scores.dot_factor, place, mask);
  using V = Vec<T>;
  const V factor = V::set1(scores.dot_factor);
  for (int at = 0; at < place.rows * kTileKeys; at += V::kLanes) (V::load(p + at) * factor).store(p + at);
  if (scores.softcap != 0) scores.cap(p, kTileKeys, place.rows, slope);
  scores.add_terms(p, kTileKeys, place.row0, place.rows, place.key0);
  probabilities<T, kPartial>(p, lse, T(1), place);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
