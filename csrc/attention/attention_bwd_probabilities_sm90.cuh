// From the accumulators of S^T = k q^T and dP^T = v dO^T to the operands of the products that follow; keys are rows.
// Traits: Element, kKind, kColTiles, Scores, Operand, kEarlyDv, kSumsRows.
#pragma once

#include "attention/attention_bwd_scores.cuh"
#include "attention/attention_mask_stage_sm90.cuh"
#include "attention/attention_tile_sm90.cuh"

namespace fastattn {

// Column tile n of an operand, from its four elements of this lane.
template <typename Element, int kDepthTiles>
FASTATTN_DEVICE void pack_column_tile(uint32_t (&operand)[kDepthTiles][4], int n, const float (&x)[4]) {
  operand[n / 2][n % 2 * 2] = pack2<Element>(x[0], x[1]);
  operand[n / 2][n % 2 * 2 + 1] = pack2<Element>(x[2], x[3]);
}

// Where a step finds attn_mask.
struct StepMask {
  bool is_needed = false;
  const MaskStages* stages = nullptr;
  const uint8_t* stage_smem = nullptr;  // null: in global memory
  int stage = 0;
  int key = 0;  // of this lane's first row, in the stage
};

// Scores become probabilities: `p` is the operand of the product with dO, 0 where dropped; `s` what the gradient of the
// scores needs, p (1 - t^2), negative where dropped.
template <typename Traits>
FASTATTN_DEVICE void make_probabilities(typename Traits::Scores& s, typename Traits::Operand& p,
                                        const ScoreArgs& scores, const DropoutState& dropout, TransposedPlace place,
                                        bool is_cut, const float* lse_smem, const StepMask& mask) {
  constexpr bool kPlain = Traits::kKind == ScoreKind::kPlain, kEverything = Traits::kKind == ScoreKind::kEverything;
  // Of a capped score, `s` is what dX needs, and not dS.
  constexpr bool kCaps = kEverything && !Traits::kSumsRows;
  // Where nothing else changes scores, in a pass of its own: a branch in every column would keep the compiler from
  // having loads and exponentials of several under way.
  if (kPlain && is_cut) {
#pragma unroll
    for (int n = 0; n < Traits::kColTiles; ++n) {
      const TransposedPlace column = {place.first_key, place.first_query + 8 * n, place.batch, place.head};
      hide_outside_band_transposed</*kHidePastEnd=*/true>(reinterpret_cast<float (&)[1][1][4]>(s[0][n]), scores,
                                                          column);
    }
  }
#pragma unroll
  for (int n = 0; n < Traits::kColTiles; ++n) {
    float x[1][1][4], derivative[4], kept_p[4];
    for_each_transposed(x, [&](float& element, int, int half, int e) { element = s[0][n][2 * half + e]; });
    if constexpr (!kPlain) scale_scores<kCaps>(x, scores);
    if constexpr (kCaps) {
      if (scores.softcap_log2 > 0.0f) {
        for_each_transposed(x, [&](float& element, int, int half, int e) {
          derivative[2 * half + e] = softcap_derivative(element, scores);
        });
      }
    }
    if constexpr (kEverything) {
      if (scores.alibi_slopes != nullptr) add_alibi_transposed(x, scores, place);
    }
    if (!kPlain && mask.is_needed) {
      if (mask.stage_smem != nullptr) {
        apply_mask_stage_transposed(x, scores, *mask.stages, mask.stage_smem, mask.key, 8 * n + lane_column());
      } else {
        apply_mask_transposed(x, scores, place);
      }
    }
    if (!kPlain && is_cut) hide_outside_band_transposed</*kHidePastEnd=*/true>(x, scores, place);

    const float2 lse = *reinterpret_cast<const float2*>(lse_smem + 8 * n + lane_column());
    for_each_transposed(x, [&](float& element, int, int half, int e) {
      element = ex2_approx(fmaf(element, kPlain ? scores.scale_log2 : 1.0f, e == 0 ? -lse.x : -lse.y));
      kept_p[2 * half + e] = element;
    });
    if constexpr (kCaps) {
      if (scores.softcap_log2 > 0.0f) {
        for_each_transposed(x, [&](float& element, int, int half, int e) { element *= derivative[2 * half + e]; });
      }
    }
    if constexpr (kEverything) {
      if (scores.dropout_threshold > 0) {
        const uint32_t kept = kept_transposed<1>(scores, dropout, place);
        for_each_transposed(x, [&](float& element, int, int half, int e) {
          if (((kept >> (2 * half + e)) & 1) == 0) {
            element = -element;
            kept_p[2 * half + e] = 0.0f;
          }
        });
      }
    }
    for_each_transposed(x, [&](float& element, int, int half, int e) { s[0][n][2 * half + e] = element; });
    if constexpr (Traits::kEarlyDv) pack_column_tile<typename Traits::Element>(p, n, kept_p);
    place.first_query += 8;
  }
}

// Sums over a warp's 16 keys, of 64 queries after another. A row of dS is a column of the accumulators, spread over
// eight lanes. Two column tiles with sums of which lanes have halves become one with those of which they have quarters,
// each lane taking the tile that a bit of its number names: 14 shuffles where every lane learning all would take 48. In
// the end lane l has the sums of queries 2 l and 2 l + 1.
struct KeySums {
  // Anew in each step: kept from step to step, it would be a register too many.
  const int lane = opaque(static_cast<int>(threadIdx.x)) % 32;
  float waiting[3][2];  // of the column tile to its left, after so many joins

  // Column tile n of eight, from its four elements of this lane; the last of them makes `sums`.
  FASTATTN_DEVICE void add(int n, const float (&x)[4], float2& sums) {
    float sum[2] = {x[0] + x[2], x[1] + x[3]};
#pragma unroll
    for (int level = 0; level < 3; ++level) {
      const bool takes_right = (lane >> (2 + level) & 1) != 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((n >> level & 1) == 0) {
          waiting[level][e] = sum[e];
        } else {
          const float left = waiting[level][e], right = sum[e];
          const float others = __shfl_xor_sync(kFullWarp, takes_right ? left : right, 4 << level);
          sum[e] = (takes_right ? right : left) + others;
        }
      }
      if ((n >> level & 1) == 0) return;
    }
    sums = make_float2(sum[0], sum[1]);
  }
};

// dP becomes dX, rounded, with what make_probabilities left in `s`; and P is rounded here if dv comes late.
template <typename Traits>
FASTATTN_DEVICE void make_score_gradients(typename Traits::Operand& dx, [[maybe_unused]] typename Traits::Operand& p,
                                          const typename Traits::Scores& dp, const typename Traits::Scores& s,
                                          const ScoreArgs& scores, const float* delta_smem,
                                          [[maybe_unused]] float2& row_sums) {
  [[maybe_unused]] KeySums key_sums;
#pragma unroll
  for (int n = 0; n < Traits::kColTiles; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(delta_smem + 8 * n + lane_column());
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float row_delta = i % 2 == 0 ? delta.x : delta.y;
      if constexpr (Traits::kKind == ScoreKind::kEverything) {
        // Without dropout nothing is negative and the scale is 1.
        x[i] = fabsf(s[0][n][i]) * fmaf(dp[0][n][i], s[0][n][i] < 0.0f ? 0.0f : scores.dropout_scale, -row_delta);
      } else {
        x[i] = s[0][n][i] * (dp[0][n][i] - row_delta);
      }
    }
    if constexpr (!Traits::kEarlyDv) pack_column_tile<typename Traits::Element>(p, n, s[0][n]);
    pack_column_tile<typename Traits::Element>(dx, n, x);
    if constexpr (Traits::kSumsRows) key_sums.add(n, x, row_sums);
  }
}

// dq = dX k, this warpgroup's part: 64 queries from `query` on, the columns of dq from `col` on.
template <typename Element, typename TileDx, typename TileK, int kColTiles>
FASTATTN_DEVICE void issue_dq(float (&dq)[1][kColTiles][4], TileDx dx, int query, TileK k, int col) {
  const uint64_t dx_descriptor = advance_descriptor(dx.mn_major(), query / TileDx::kPanelCols * TileDx::kPanelBytes);
  const uint64_t k_descriptor = advance_descriptor(k.mn_major(), col / TileK::kPanelCols * TileK::kPanelBytes);
#pragma unroll
  for (int key = 0; key < TileK::kRows; key += 16) {
    wgmma_m64k16<Element, Major::kMN, Major::kMN>(wgmma_registers(dq),
                                                  advance_descriptor(dx_descriptor, key * TileDx::kRowBytes),
                                                  advance_descriptor(k_descriptor, key * TileK::kRowBytes), key > 0);
  }
}

}  // namespace fastattn
