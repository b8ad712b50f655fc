// The backward of one tile, kTileQueries rows by kTileKeys keys of one head: five matrix products and, between them,
// what turns dot products into probabilities p and their gradients into those of the scores, ds.
#pragma once

#include "attention/attention_probs_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The query side of one head: q and dout as left operands, whose terms are columns, and as right operands, whose terms
// are rows (of T, the same memory), padded with zeros to whole vectors.
template <typename T, typename Operand>
struct QuerySide {
  Rows<const Operand> q, dout;
  Rows<const Operand> q_terms, dout_terms;
  Rows<T> dq;
  // Per row: lse (+inf for a row that sees nothing, which makes its p 0), and sum(dout * out) - dlse.
  T *lse, *delta;
};

// The key side of one tile. k_t and v_t are transposed by pack_keys, k is a right operand whose terms are keys.
template <typename T, typename Operand>
struct KeySide {
  const Operand *k_t, *v_t;
  Rows<const Operand> k;
  Rows<T> dk, dv;
};

// Scratch for kTileQueries x kTileKeys each; `dropped` only with dropout, `slope` only with softcap, `left` only where
// Operand is not T.
template <typename T, typename Operand>
struct TileBuffers {
  T *p, *ds, *dropped, *slope;
  Operand* left;
  ReadAhead* ahead;  // what the products fetch on the way
};

// ds = factor * p * (dp - delta), in place of dp, where dp is the gradient of p: through dropout, 0 or keep_scale times
// the product dout v^T. Hidden elements are chosen to be 0, not multiplied by p = 0: their dp was never computed.
template <typename T, bool kPartial, bool kDropout>
FASTATTN_INLINE void score_gradients(T* ds, const T* p, const T* delta, T factor, T keep_scale,
                                     const TilePlace& place) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  for (int r = 0; r < place.rows; ++r, ds += kTileKeys, p += kTileKeys) {
    const V row_delta = V::set1(delta[r]);
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      V dp = V::load(ds + key);
      if constexpr (kDropout) {
        const auto kept = V::mask_from_bits(static_cast<uint32_t>(place.kept[r] >> key));
        dp = select(kept, dp * V::set1(keep_scale), V::zero());
      }
      V x = (dp - row_delta) * (V::load(p + key) * scale);
      if constexpr (kPartial) {
        x = select(V::mask_from_bits(static_cast<uint32_t>(place.visible[r] >> key)), x, V::zero());
      }
      x.store(ds + key);
    }
  }
}

// Which part of each product a partly visible tile needs. `scores` is for q k^T and dout v^T, `keys` for the products
// over rows (dk, dv: a strip holds keys), `queries` for the product over keys (dq: a strip holds rows).
struct TileLimits {
  StripLimits scores, keys, queries;
};

template <bool kPartial>
FASTATTN_INLINE void set_limits(TileLimits& limits, const TilePlace& place, bool needs_all_scores) {
  limits.keys.set_all(place.rows, kTileKeys * 8);
  limits.queries.set_all(place.keys, kTileKeys * 8);
  limits.scores.set_all(0, kTileKeys);
  if constexpr (!kPartial) return;
  for (int row = 0, strip = 0; row < place.rows; ++strip) {
    const int height = strip_rows(place.rows - row);
    uint64_t seen = 0;
    for (int r = row; r < row + height; ++r) seen |= place.visible[r];
    const int begin = seen ? __builtin_ctzll(seen) : 0, end = seen ? kTileKeys - __builtin_clzll(seen) : 0;
    if (!needs_all_scores) limits.scores.columns[strip] = end;
    limits.queries.depth_begin[strip] = begin;
    limits.queries.depth_end[strip] = end;
    row += height;
  }
  for (int key = 0, strip = 0; key < place.keys; ++strip) {
    const int height = strip_rows(place.keys - key);
    const uint64_t strip_bits = key_bits(key, key + height);
    int begin = 0, end = place.rows;
    while (begin < end && !(place.visible[begin] & strip_bits)) ++begin;
    while (end > begin && !(place.visible[end - 1] & strip_bits)) --end;
    limits.keys.depth_begin[strip] = begin;
    limits.keys.depth_end[strip] = end;
    key += height;
  }
}

// Adds the tile's part to dk, dv and dq, or starts them with it. `add_to_mask(ds)` sees the gradients of the scores
// after softcap; `before_dq()` comes just before dq is touched.
template <bool kPartial, typename T, typename Operand, typename AddToMask, typename BeforeDq>
FASTATTN_INLINE void backward_tile_as(const AttentionBwdParams& p, const HeadScores<T>& scores,
                                      const QuerySide<T, Operand>& head, const KeySide<T, Operand>& tile,
                                      const TileBuffers<T, Operand>& buffers, const TilePlace& place, T keep_scale,
                                      bool wants_dmask, AddToMask&& add_to_mask, BeforeDq&& before_dq) {
  const int rows = place.rows, head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const auto rows_of = [&](Rows<const Operand> all, int terms) __attribute__((always_inline)) {
    return Rows<const Operand>{all.data + place.row0 / terms * all.stride, all.stride};
  };
  const Rows<const Operand> q = rows_of(head.q, 1), q_terms = rows_of(head.q_terms, kTerms<Operand>);
  const Rows<const Operand> dout = rows_of(head.dout, 1), dout_terms = rows_of(head.dout_terms, kTerms<Operand>);
  const Rows<T> dq = {head.dq.data + place.row0 * head.dq.stride, head.dq.stride};
  const T *lse = head.lse + place.row0, *delta = head.delta + place.row0;
  TileLimits limits;
  // The slope of softcap is multiplied with, so it must not stem from a score that was never computed.
  set_limits<kPartial>(limits, place, /*needs_all_scores=*/scores.softcap != 0);
  limits.scores.ahead = limits.keys.ahead = limits.queries.ahead = buffers.ahead;
  const auto set_depth = [&](int depth) __attribute__((always_inline)) {
    for (int strip = 0; strip < kMaxStrips; ++strip) limits.scores.depth_end[strip] = depth;
  };
  const T scale = static_cast<T>(p.scale);

  set_depth(head_dim);
  recompute_probabilities<T, kPartial, Operand>(buffers.p, buffers.slope, scores, q, tile.k_t, lse, place,
                                                limits.scores);

  const T* weights = buffers.p;
  if (place.kept) {
    drop(buffers.dropped, buffers.p, keep_scale, place);
    weights = buffers.dropped;
  }
  gemm<T, Operand>(tile.dv, {left_over_rows(buffers.left, weights, rows), 1, kTileKeys}, dout_terms, place.keys,
                   head_dim_v, !place.starts_dkv, limits.keys);

  set_depth(head_dim_v);
  gemm<T, Operand>({buffers.ds, kTileKeys}, {dout.data, dout.stride, 1}, {tile.v_t, kTileKeys}, rows, kTileKeys, false,
                   limits.scores);
  const bool scales_later = wants_dmask || scores.softcap != 0;
  const T factor = scales_later ? T(1) : scale;
  if (place.kept) {
    score_gradients<T, kPartial, true>(buffers.ds, buffers.p, delta, factor, keep_scale, place);
  } else {
    score_gradients<T, kPartial, false>(buffers.ds, buffers.p, delta, factor, keep_scale, place);
  }
  if (scales_later) {
    using V = Vec<T>;
    if (wants_dmask) add_to_mask(buffers.ds);
    for (int at = 0; at < rows * kTileKeys; at += V::kLanes) {
      const V ds = V::load(buffers.ds + at) * V::set1(scale);
      (scores.softcap != 0 ? ds * V::load(buffers.slope + at) : ds).store(buffers.ds + at);
    }
  }

  gemm<T, Operand>(tile.dk, {left_over_rows(buffers.left, buffers.ds, rows), 1, kTileKeys}, q_terms, place.keys,
                   head_dim, !place.starts_dkv, limits.keys);
  const Operand* ds = left_over_keys(buffers.left, buffers.ds, rows);
  before_dq();
  gemm<T, Operand>(dq, {ds, kTileKeys / kTerms<Operand>, 1}, tile.k, rows, head_dim, !place.starts_dq, limits.queries);
}

template <typename T, typename Operand, typename AddToMask, typename BeforeDq>
FASTATTN_INLINE void backward_tile(const AttentionBwdParams& p, const HeadScores<T>& scores,
                                   const QuerySide<T, Operand>& head, const KeySide<T, Operand>& tile,
                                   const TileBuffers<T, Operand>& buffers, const TilePlace& place, T keep_scale,
                                   bool wants_dmask, AddToMask&& add_to_mask, BeforeDq&& before_dq) {
  if (place.visible) {
    backward_tile_as<true>(p, scores, head, tile, buffers, place, keep_scale, wants_dmask, add_to_mask, before_dq);
  } else {
    backward_tile_as<false>(p, scores, head, tile, buffers, place, keep_scale, wants_dmask, add_to_mask, before_dq);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
