// Gradients of keys and values:  dv_j = sum_i z_ij p_ij dO_i,   dk_j = scale sum_i dx_ij q_i.
// There dx = p (1 - t^2) (dp - delta), dp_ij = z_ij dO_i v_j, z is what dropout multiplies by, t the softcap's tanh.
// Work:    one block per (batch, key head, kBlockK keys) visits the visible query tiles of every head of the group.
//          Warps work in pairs, 16 kRowTiles keys a pair. One warp makes P^T = exp2(k q^T - lse) and dv, the other
//          dP^T = v dO^T and dk: two products each, and accumulators of one gradient each, so that up to head_dim 128
//          a warp has room for 32 keys. Then shared memory, the limit on 8.0 and 9.0, delivers half as much a product.
// Memory:  k and v stay; q, dO, lse and delta arrive in two stages. P goes from warp to warp through shared memory, in
//          the order of the registers, 16 bytes a lane; P^T and dX^T are left operands of their products as they are.
// Numbers: fp16/bf16 inputs, fp32 scores, P and accumulation; P and dX are rounded for the products with dO and q.
// Order:   what a block works on and copies (BwdDkvBlock, BwdDkvCopies), each warp's share of P and dX, the way out,
//          the kernel. attention_bwd_dq_sm80.cuh is the simpler one; attention_bwd_split_sm80.cuh adds up what blocks
//          share.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2, without its dq.
#pragma once

#include "attention/attention_bwd_split_sm80.cuh"

namespace fastattn {

// kShares: whether blocks may share the queries (BwdParts).
template <typename Element_, int kHeadDim_, int kRowTiles_, int kPairs_, int kBlockQ_, ScoreKind kKind_, bool kShares_>
struct AttentionBwdDkvTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kPairs = kPairs_, kBlockQ = kBlockQ_;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kShares = kShares_;
  static constexpr bool kPacked = false, kNoMask = kKind == ScoreKind::kPlain;
  static constexpr int kThreads = 64 * kPairs;
  static constexpr int kPairKeys = 16 * kRowTiles;
  static constexpr int kBlockK = kPairKeys * kPairs;
  static constexpr int kColTiles = kBlockQ / 8;
  using TileK = SharedTile<kBlockK, kHeadDim>;
  using TileQ = SharedTile<kBlockQ, kHeadDim>;
  using Scores = float[kRowTiles][kColTiles][4];
  using Gradient = float[kRowTiles][kHeadDim / 8][4];

  // k, v, then two stages of (q, dO), P, two stages of (lse, delta).
  static constexpr int kStageBytes = 2 * TileQ::kBytes;
  static constexpr int kPairBytes = kRowTiles * kColTiles * 32 * 16;
  static constexpr int kStatisticsBytes = 2 * kBlockQ * 4;
  static constexpr int kStagesAt = 2 * TileK::kBytes;
  static constexpr int kExchangeAt = kStagesAt + 2 * kStageBytes;
  static constexpr int kStatisticsAt = kExchangeAt + kPairs * kPairBytes;
  static constexpr int kSmemBytes = kStatisticsAt + 2 * kStatisticsBytes;
  static_assert(kBlockQ % 16 == 0, "queries are the depth of the second product");
  static_assert(kRowPadding % kBlockQ == 0, "the statistics of the last tile's rows exist");
};

// ---- what a block does

// The keys of one block, and this warp's. Under a causal mask most queries see the first keys: those blocks go first.
template <typename Traits>
struct BwdDkvBlock {
  const AttentionBwdArgs& args;
  const AttentionBwdArgs& own;  // args as they are for the batch entry; in a dense batch the same object
  const int key_tile = static_cast<int>(blockIdx.x) % args.key_tiles;
  const int batch_head = static_cast<int>(blockIdx.x) / args.key_tiles;
  const int batch = batch_head / args.heads_kv, head_kv = batch_head % args.heads_kv;
  const int entry = Traits::kPacked ? 0 : batch;  // of the tensors: packed sequences share one
  const int first_key = key_tile * Traits::kBlockK, keys = min(Traits::kBlockK, own.scores.seqlen_k - first_key);
  const IndexRange key_range = {first_key, first_key + keys};

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int pair = warp % Traits::kPairs, pair_key = pair * Traits::kPairKeys;
  const bool makes_dk = warp >= Traits::kPairs;  // else dv
};

// The tiles in shared memory and the copies that fill them: each function starts one group.
template <typename Traits>
struct BwdDkvCopies {
  using TileK = typename Traits::TileK;
  using TileQ = typename Traits::TileQ;

  const uint32_t smem_base;
  const BwdDkvBlock<Traits>& block;
  const TileK k_tile{smem_base}, v_tile{smem_base + TileK::kBytes};

  FASTATTN_DEVICE TileQ q_tile(int stage) const {
    return TileQ{smem_base + Traits::kStagesAt + stage * Traits::kStageBytes};
  }
  FASTATTN_DEVICE TileQ dout_tile(int stage) const { return TileQ{q_tile(stage).address + TileQ::kBytes}; }

  FASTATTN_DEVICE void load_keys() const {
    const AttentionBwdArgs &args = block.args, &own = block.own;
    const int key = block.first_key, rows = block.keys;
    load_head_rows<Traits>(k_tile, own.k, args.k, block.entry, block.head_kv, key, rows, args.head_dim);
    load_head_rows<Traits>(v_tile, own.v, args.v, block.entry, block.head_kv, key, rows, args.head_dim_v);
    cp_async_commit_group();
  }
  FASTATTN_DEVICE void load_queries(int stage, int head, int query_tile) const {
    const AttentionBwdArgs &args = block.args, &own = block.own;
    const int query = query_tile * Traits::kBlockQ, rows = own.scores.seqlen_q - query;
    load_head_rows<Traits>(q_tile(stage), own.q, args.q, block.entry, head, query, rows, args.head_dim);
    load_head_rows<Traits>(dout_tile(stage), own.dout, args.dout, block.entry, head, query, rows, args.head_dim_v);
    const uint32_t statistics_smem = smem_base + Traits::kStatisticsAt + stage * Traits::kStatisticsBytes;
    load_statistics<Traits>(statistics_smem, args, own, block.batch, head, query);
    cp_async_commit_group();
  }
};

// ---- from scores to P and dX, a column tile (eight queries) at a time

// Scores become probabilities, 0 where dropped. `pair_smem` receives what the other warp needs of each element:
// p (1 - t^2), negative where dropped.
template <typename Traits>
FASTATTN_DEVICE void make_probabilities(typename Traits::Scores& s, const ScoreArgs& scores,
                                        const DropoutState& dropout, TransposedPlace place, bool is_masked, bool is_cut,
                                        const float* lse_smem, float4* pair_smem) {
  constexpr bool kPlain = Traits::kKind == ScoreKind::kPlain;
  constexpr int kRowTiles = Traits::kRowTiles;
#pragma unroll
  for (int n = 0; n < Traits::kColTiles; ++n) {
    float x[kRowTiles][1][4], derivative[kRowTiles][4];
    for_each_transposed(x, [&](float& element, int m, int half, int e) { element = s[m][n][2 * half + e]; });
    if constexpr (!kPlain) {
      scale_scores<true>(x, scores);
      if (scores.softcap_log2 > 0.0f) {
        for_each_transposed(x, [&](float& element, int m, int half, int e) {
          derivative[m][2 * half + e] = softcap_derivative(element, scores);
        });
      }
      if (scores.alibi_slopes != nullptr) add_alibi_transposed(x, scores, place);
      if (is_masked) apply_mask_transposed(x, scores, place);
    }
    if (is_cut) hide_outside_band_transposed</*kHidePastEnd=*/false>(x, scores, place);

    const float2 lse = *reinterpret_cast<const float2*>(lse_smem + 8 * n + lane_column());
    for_each_transposed(x, [&](float& element, int, int, int e) {
      element = ex2_approx(fmaf(element, kPlain ? scores.scale_log2 : 1.0f, e == 0 ? -lse.x : -lse.y));
    });
    for_each_transposed(x, [&](float& element, int m, int half, int e) { s[m][n][2 * half + e] = element; });

    if constexpr (!kPlain) {
      if (scores.softcap_log2 > 0.0f) {
        for_each_transposed(x, [&](float& element, int m, int half, int e) { element *= derivative[m][2 * half + e]; });
      }
      if (scores.dropout_threshold > 0) {
        const uint32_t kept = kept_transposed<kRowTiles>(scores, dropout, place);
        for_each_transposed(x, [&](float& element, int m, int half, int e) {
          if (((kept >> (4 * m + 2 * half + e)) & 1) == 0) {
            element = -element;
            s[m][n][2 * half + e] = 0.0f;
          }
        });
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      pair_smem[(m * Traits::kColTiles + n) * 32] = make_float4(x[m][0][0], x[m][0][1], x[m][0][2], x[m][0][3]);
    }
    place.first_query += 8;
  }
}

// The other warp's share: dot products dO_i . v_j become dx_ij.
template <typename Traits>
FASTATTN_DEVICE void take_score_gradients(typename Traits::Scores& dp, const ScoreArgs& scores, const float* delta_smem,
                                          const float4* pair_smem) {
  constexpr bool kPlain = Traits::kKind == ScoreKind::kPlain;
#pragma unroll
  for (int n = 0; n < Traits::kColTiles; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(delta_smem + 8 * n + lane_column());
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      const float4 quad = pair_smem[(m * Traits::kColTiles + n) * 32];
      const float p[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float row_delta = i % 2 == 0 ? delta.x : delta.y;
        float& x = dp[m][n][i];
        if constexpr (kPlain) {
          x = p[i] * (x - row_delta);
        } else {
          // Without dropout nothing is negative and the scale is 1.
          x = fabsf(p[i]) * fmaf(x, p[i] < 0.0f ? 0.0f : scores.dropout_scale, -row_delta);
        }
      }
    }
  }
}

// ---- the kernel

// dk or dv of this warp's keys, from its accumulators to global memory.
template <typename Traits>
FASTATTN_DEVICE void store_dkv(const typename Traits::Gradient& gradient, const BwdDkvBlock<Traits>& block,
                               const BwdDkvCopies<Traits>& copies) {
  using Element = typename Traits::Element;
  const AttentionBwdArgs &args = block.args, &own = block.own;
  const bool makes_dk = block.makes_dk;
  const float factor = makes_dk ? args.scale : args.scores.dropout_scale;
  if (Traits::kShares && args.parts.count() > 1) {
    // Unknown to the compiler, which would otherwise make the addresses ahead of the loop and spill them.
    const int index = opaque(static_cast<int>(blockIdx.x)), part = opaque(static_cast<int>(blockIdx.y));
    const int first_row = index % args.key_tiles * Traits::kBlockK + block.pair_key;
    const int64_t key = int64_t{index / args.key_tiles} * args.scores.seqlen_k + first_row;
    store_part(gradient, factor, args.parts.sums(!makes_dk, part) + key * args.parts.columns, args.parts.columns,
               own.scores.seqlen_k - first_row);
    return;
  }
  FASTATTN_DYNAMIC_SMEM(smem);
  const AttentionTensor& tensor = makes_dk ? own.dk : own.dv;
  const TileOutput<Element> output = {
      head_gmem<Element>(tensor, block.entry, block.head_kv) + (block.first_key + block.pair_key) * tensor.stride_row,
      tensor.stride_row, block.keys - block.pair_key, makes_dk ? args.head_dim : args.head_dim_v,
      makes_dk ? args.dk_is_aligned : args.dv_is_aligned};
  store_accumulators(gradient, factor, makes_dk ? copies.k_tile : copies.v_tile,
                     smem + (makes_dk ? 0 : Traits::TileK::kBytes), block.pair_key, output);
}

// Both warps of a pair do the same with different operands: k q^T, then P^T dO; or v dO^T, then dX^T q.
template <typename Traits>
FASTATTN_DEVICE void attention_bwd_dkv_block(const AttentionBwdArgs& args, const AttentionBwdArgs& own) {
  using Element = typename Traits::Element;
  using TileQ = typename Traits::TileQ;
  constexpr int kBlockQ = Traits::kBlockQ;
  FASTATTN_DYNAMIC_SMEM(smem);
  const uint32_t smem_base = smem_address(smem);
  const BwdDkvBlock<Traits> block{args, own};
  const BwdDkvCopies<Traits> copies{smem_base, block};
  const int batch = block.batch, lane = block.lane;
  const bool makes_dk = block.makes_dk;
  float4* pair_smem = reinterpret_cast<float4*>(smem + Traits::kExchangeAt + block.pair * Traits::kPairBytes) + lane;

  copies.load_keys();
  QueryTileWalk<Traits> walk(own, batch, block.head_kv, block.key_tile, block.key_range,
                             Traits::kShares ? args.parts : BwdParts(), static_cast<int>(blockIdx.y));
  if (!walk.done()) copies.load_queries(0, walk.head, walk.tile);

  DropoutState dropout;
  if constexpr (Traits::kKind == ScoreKind::kEverything) dropout = load_dropout_state(args.scores);
  const FragmentLoader<Fragment::kA, typename Traits::TileK> key_fragments(makes_dk ? copies.v_tile : copies.k_tile,
                                                                           block.pair_key);
  typename Traits::Gradient gradient = {};

  for (int stage = 0; !walk.done(); stage ^= 1) {
    const int head = walk.head, first_query = walk.tile * kBlockQ;
    const bool is_masked = walk.is_partial();
    cp_async_wait_group<0>();
    __syncthreads();  // this stage is there for everyone; everyone has done with the other one, and with P
    walk.advance();
    if (!walk.done()) copies.load_queries(stage ^ 1, walk.head, walk.tile);

    const TileQ q_tile = copies.q_tile(stage), dout_tile = copies.dout_tile(stage);
    typename Traits::Scores s = {};
    const FragmentLoader<Fragment::kB, TileQ> right(makes_dk ? dout_tile : q_tile);
    multiply_tiles<Element, Traits::kHeadDim>(s, key_fragments, right);

    const float* lse_smem =
        reinterpret_cast<const float*>(smem + Traits::kStatisticsAt + stage * Traits::kStatisticsBytes);
    if (makes_dk) {
      bar_sync(1 + block.pair, 64);
      take_score_gradients<Traits>(s, args.scores, lse_smem + kBlockQ, pair_smem);
    } else {
      const IndexRange all = band_of(own.scores).keys_seen_by_all({first_query, first_query + kBlockQ});
      const bool is_cut = all.begin > block.key_range.begin || all.end < block.key_range.end;
      const TransposedPlace place = {block.first_key + block.pair_key + lane / 4, first_query + lane_column(), batch,
                                     head};
      make_probabilities<Traits>(s, tile_scores<Traits>(args.scores, own.scores), dropout, place, is_masked, is_cut,
                                 lse_smem, pair_smem);
      bar_arrive(1 + block.pair, 64);
    }
    const FragmentLoader<Fragment::kBTransposed, TileQ> summed(makes_dk ? q_tile : dout_tile);
    multiply_accumulators<Element>(gradient, s, summed);
  }
  cp_async_wait_group<0>();
  __syncthreads();  // everyone has done with k and v, whose tiles become the gradients'
  store_dkv(gradient, block, copies);
}

// Traits: AttentionBwdDkvTraits, or PackedTraits of them.
template <typename Traits, typename Cards>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_bwd_dkv_kernel(const __grid_constant__ AttentionBwdArgs args) {
  if constexpr (Cards::kHasCode) {
    const int block = static_cast<int>(blockIdx.x), batch = block / (args.key_tiles * args.heads_kv);
    const AttentionBwdArgs& own = entry_args<Traits>(args, batch);
    // The grid is that of the longest sequence.
    if (Traits::kPacked && block % args.key_tiles * Traits::kBlockK >= own.scores.seqlen_k) return;
    attention_bwd_dkv_block<Traits>(args, own);
  } else {
    never_launched();
  }
}

}  // namespace fastattn
