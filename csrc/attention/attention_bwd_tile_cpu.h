// The backward of one tile, kTileQueries rows by kTileKeys keys of one head: five matrix products and, between them,
// what turns dot products into probabilities p and their gradients into those of the scores, ds.
#pragma once

#include "attention/attention_bwd_rows_cpu.h"
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
  // Per row: lse (+inf for a row that sees nothing, which makes its p 0), its gradient, and dout . out where the keys
  // are not all at hand.
  T *lse, *dlse, *delta;
};

// The key side of one tile. k_t and v_t are transposed by pack_keys, k is a right operand whose terms are keys.
template <typename T, typename Operand>
struct KeySide {
  const Operand *k_t, *v_t;
  Rows<const Operand> k;
  Rows<T> dk, dv;
};

// Scratch for kTileQueries x kTileKeys each; `slope` only with softcap, `left` only where Operand is not T.
template <typename T, typename Operand>
struct TileBuffers {
  T *p, *ds, *slope;
  Operand* left;
  ReadAhead* ahead;  // what the products fetch on the way
};

// ds = factor * p * ((dp - delta) + dlse), in place of dp, where dp is the gradient of p: through dropout, 0 or
// keep_scale times the product dout v^T. Hidden elements are chosen to be 0, not multiplied by p = 0: their dp was
// never computed. p becomes what multiplies dout in dv.
template <typename T, bool kPartial, bool kDropout, bool kWeighs>
FASTATTN_INLINE void score_gradients(T* ds, T* p, const RowTerms<T>& terms, T factor, T keep_scale,
                                     const TilePlace& place) {
  using V = Vec<T>;
  for (int r = 0; r < place.rows; ++r, ds += kTileKeys, p += kTileKeys) {
    const V delta = V::set1(terms.delta[r]), dlse = V::set1(terms.dlse[r]);
    const T weight = kWeighs ? terms.weight[r] : T(1);
    const V p_factor = V::set1(weight * factor);
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      V dp = V::load(ds + key), dv_factor = V::load(p + key);
      V x = dv_factor * p_factor;
      if constexpr (kWeighs || kDropout) dv_factor = dv_factor * V::set1(kDropout ? weight * keep_scale : weight);
      if constexpr (kDropout) {
        const auto kept = V::mask_from_bits(static_cast<uint32_t>(place.kept[r] >> key));
        dp = select(kept, dp * V::set1(keep_scale), V::zero());
        dv_factor = select(kept, dv_factor, V::zero());
      }
      x = ((dp - delta) + dlse) * x;
      if constexpr (kPartial) {
        x = select(V::mask_from_bits(static_cast<uint32_t>(place.visible[r] >> key)), x, V::zero());
      }
      x.store(ds + key);
      if constexpr (kWeighs || kDropout) dv_factor.store(p + key);
    }
  }
}

template <typename T, bool kPartial>
FASTATTN_INLINE void score_gradients(T* ds, T* p, const RowTerms<T>& terms, T factor, T keep_scale,
                                     const TilePlace& place) {
  if (place.kept && terms.weight) {
    score_gradients<T, kPartial, true, true>(ds, p, terms, factor, keep_scale, place);
  } else if (place.kept) {
    score_gradients<T, kPartial, true, false>(ds, p, terms, factor, keep_scale, place);
  } else if (terms.weight) {
    score_gradients<T, kPartial, false, true>(ds, p, terms, factor, keep_scale, place);
  } else {
    score_gradients<T, kPartial, false, false>(ds, p, terms, factor, keep_scale, place);
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

// Rows of one head against one tile of keys, and what the row by row arithmetic needs besides operands.
template <typename T, typename Operand>
struct BackwardTile {
  const AttentionBwdParams* params;
  const HeadScores<T>* scores;
  const QuerySide<T, Operand>* head;
  KeySide<T, Operand> keys;
  TileBuffers<T, Operand> buffers;
  TilePlace place;
  T keep_scale;

  FASTATTN_INLINE Rows<const Operand> rows_of(Rows<const Operand> all, int terms = 1) const {
    return {all.data + place.row0 / terms * all.stride, all.stride};
  }
  FASTATTN_INLINE TileLimits limits() const {
    TileLimits limits;
    // The slope of softcap is multiplied with, so it must not stem from a score that was never computed.
    if (place.visible) {
      set_limits<true>(limits, place, /*needs_all_scores=*/scores->softcap != 0);
    } else {
      set_limits<false>(limits, place, false);
    }
    limits.scores.ahead = limits.keys.ahead = limits.queries.ahead = buffers.ahead;
    const AttentionBwdParams& p = *params;
    limits.scores.chain = chain_length(p.seqlen_q, p.seqlen_k, max_of(p.head_dim, p.head_dim_v));
    limits.keys.chain = chain_length(p.seqlen_k, min_of(p.head_dim, p.head_dim_v), kTileQueries);
    limits.queries.chain = chain_length(p.seqlen_q, p.head_dim, kTileKeys);
    return limits;
  }
};

// buffers.p = exp(s - lse), and buffers.ds = dp, before dropout.
template <typename T, typename Operand>
FASTATTN_INLINE void probabilities_and_gradients(const BackwardTile<T, Operand>& tile, TileLimits& limits) {
  const TilePlace& place = tile.place;
  const AttentionBwdParams& p = *tile.params;
  const Rows<const Operand> q = tile.rows_of(tile.head->q), dout = tile.rows_of(tile.head->dout);
  const T* lse = tile.head->lse + place.row0;
  const auto set_depth = [&](int64_t depth) __attribute__((always_inline)) {
    for (int strip = 0; strip < kMaxStrips; ++strip) limits.scores.depth_end[strip] = static_cast<int>(depth);
  };
  set_depth(p.head_dim);
  if (place.visible) {
    recompute_probabilities<T, true, Operand>(tile.buffers.p, tile.buffers.slope, *tile.scores, q, tile.keys.k_t, lse,
                                              place, limits.scores);
  } else {
    recompute_probabilities<T, false, Operand>(tile.buffers.p, tile.buffers.slope, *tile.scores, q, tile.keys.k_t, lse,
                                               place, limits.scores);
  }
  set_depth(p.head_dim_v);
  gemm<T, Operand>({tile.buffers.ds, kTileKeys}, {dout.data, dout.stride, 1}, {tile.keys.v_t, kTileKeys}, place.rows,
                   kTileKeys, false, limits.scores);
}

// From what probabilities_and_gradients left, adds the tile's part to dv, dk and dq, or starts them with it.
// `add_to_mask(ds)` sees the gradients of the scores after softcap; `before_dkv()`, `before_dq()` come just before
// these are touched.
template <typename T, typename Operand, typename AddToMask, typename BeforeDkv, typename BeforeDq>
FASTATTN_INLINE void add_gradients(const BackwardTile<T, Operand>& tile, const TileLimits& limits,
                                   const RowTerms<T>& terms, bool wants_dmask, AddToMask&& add_to_mask,
                                   BeforeDkv&& before_dkv, BeforeDq&& before_dq) {
  const TilePlace& place = tile.place;
  const TileBuffers<T, Operand>& buffers = tile.buffers;
  const int rows = place.rows, keys = place.keys;
  const int head_dim = static_cast<int>(tile.params->head_dim), head_dim_v = static_cast<int>(tile.params->head_dim_v);
  const T scale = static_cast<T>(tile.params->scale);
  const bool has_slope = tile.scores->softcap != 0, scales_later = wants_dmask || has_slope;
  const T factor = scales_later ? T(1) : scale;
  if (place.visible) {
    score_gradients<T, true>(buffers.ds, buffers.p, terms, factor, tile.keep_scale, place);
  } else {
    score_gradients<T, false>(buffers.ds, buffers.p, terms, factor, tile.keep_scale, place);
  }
  if (scales_later) {
    using V = Vec<T>;
    if (wants_dmask) add_to_mask(buffers.ds);
    for (int at = 0; at < rows * kTileKeys; at += V::kLanes) {
      const V ds = V::load(buffers.ds + at) * V::set1(scale);
      (has_slope ? ds * V::load(buffers.slope + at) : ds).store(buffers.ds + at);
    }
  }

  before_dkv();
  gemm<T, Operand>(tile.keys.dv, {left_over_rows(buffers.left, buffers.p, rows), 1, kTileKeys},
                   tile.rows_of(tile.head->dout_terms, kTerms<Operand>), keys, head_dim_v, !place.starts_dkv,
                   limits.keys);
  gemm<T, Operand>(tile.keys.dk, {left_over_rows(buffers.left, buffers.ds, rows), 1, kTileKeys},
                   tile.rows_of(tile.head->q_terms, kTerms<Operand>), keys, head_dim, !place.starts_dkv, limits.keys);
  const Operand* ds = left_over_keys(buffers.left, buffers.ds, rows);
  before_dq();
  const Rows<T> dq = {tile.head->dq.data + place.row0 * tile.head->dq.stride, tile.head->dq.stride};
  gemm<T, Operand>(dq, {ds, kTileKeys / kTerms<Operand>, 1}, tile.keys.k, rows, head_dim, !place.starts_dq,
                   limits.queries);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
