// Attention weights for compute capability 8.0 and newer:  w = exp(score - lse), after dropout, or its mean over heads.
// Work:    one block per (batch, head, 64 queries, 64 keys), or per (batch, 64 queries, 64 keys), which then adds up
//          the heads in order.
// Memory:  one tile of q and one of k in shared memory. The result is as large as the scores: writing it is the limit.
// Numbers: fp16/bf16 inputs, fp32 scores and sums.
#pragma once

#include "attention/attention_fwd_sm80.cuh"

namespace fastattn {

template <typename Element_, int kHeadDim_>
struct AttentionWeightsTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = 1, kWarps = 4, kBlockK = 64;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = 16 * kRowTiles * kWarps;
  using TileQ = SharedTile<kBlockQ, kHeadDim>;
  using TileK = SharedTile<kBlockK, kHeadDim>;
  static constexpr int kSmemBytes = TileQ::kBytes + TileK::kBytes;
  static constexpr int kMinBlocks = 2;  // a multiprocessor; for three the compiler would spill a few registers
};

struct AttentionWeightsArgs {
  ScoreArgs scores;
  AttentionTensor q, k;
  const float* lse = nullptr;
  void* weights = nullptr;
  int heads_kv = 0, head_dim = 0;
  int64_t row_tiles = 0, key_tiles = 0;
  bool average_heads = false;
};

// w of one head, for this warp's rows.
template <typename Traits>
FASTATTN_DEVICE void head_weights(float (&w)[1][Traits::kBlockK / 8][4], const AttentionWeightsArgs& args, int batch,
                                  int head, int first_row, int col0) {
  using Element = typename Traits::Element;
  FASTATTN_DYNAMIC_SMEM(smem);
  const typename Traits::TileQ q_tile{smem_address(smem)};
  const typename Traits::TileK k_tile{q_tile.address + Traits::TileQ::kBytes};
  const ScoreArgs& scores = args.scores;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int head_kv = head / (scores.heads / args.heads_kv);
  const QueryRows rows = {first_row + warp_row + lane / 4, head, 1};

  __syncthreads();  // everyone has done with the last head's tiles
  const auto load = [&](auto tile, const AttentionTensor& tensor, int of_head, int first, int seqlen) {
    const Element* gmem = static_cast<const Element*>(tensor.data) + batch * tensor.stride_batch +
                          of_head * tensor.stride_head + first * tensor.stride_row;
    load_tile<Traits::kThreads>(tile, gmem, tensor.stride_row, seqlen - first, args.head_dim);
  };
  load(q_tile, args.q, head, first_row, scores.seqlen_q);
  load(k_tile, args.k, head_kv, col0, scores.seqlen_k);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  const FragmentLoader<Fragment::kA, typename Traits::TileQ> q_fragments(q_tile, warp_row);
  const FragmentLoader<Fragment::kB, typename Traits::TileK> k_fragments(k_tile);
  for_each_score(w, [](float& x, int, int, int, int) { x = 0.0f; });
  multiply_tiles<Element, Traits::kHeadDim>(w, q_fragments, k_fragments);
  scale_scores<true>(w, scores);
  if (scores.alibi_slopes != nullptr) add_alibi(w, scores, rows, batch, col0);
  if (scores.mask.data != nullptr) apply_mask(w, scores, rows, batch, col0);
  hide_outside_band(w, scores, rows, col0);

  const int64_t lse_row = (int64_t{batch} * scores.heads + head) * scores.seqlen_q;
  float lse_log2[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float lse = args.lse[lse_row + min(rows.row(0, half), scores.seqlen_q - 1)];
    // A row that sees nothing has lse = -inf, and weights of 0.
    lse_log2[half] = lse == -INFINITY ? INFINITY : lse * kLog2E;
  }
  for_each_score(w,
                 [&](float& x, int, int half, int, int) { x = ex2_approx(x - lse_log2[half]) * scores.dropout_scale; });
  if (scores.dropout_threshold > 0) {
    drop_probabilities(w, scores, load_dropout_state(scores), rows, batch, col0);
  }
}

template <typename Traits>
FASTATTN_DEVICE void store_weights(const float (&w)[1][Traits::kBlockK / 8][4], const AttentionWeightsArgs& args,
                                   int64_t batch_head, int first_row, int col0) {
  using Element = typename Traits::Element;
  const int seqlen_q = args.scores.seqlen_q, seqlen_k = args.scores.seqlen_k;
  const int lane_row = first_row + static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row + 8 * half;
    if (row >= seqlen_q) continue;
    Element* row_gmem = static_cast<Element*>(args.weights) + (batch_head * seqlen_q + row) * seqlen_k;
#pragma unroll
    for (int n = 0; n < Traits::kBlockK / 8; ++n) {
      const int col = col0 + 8 * n + lane_column();
      const Vec<Element, 2> pair = {
          {from_float<Element>(w[0][n][2 * half]), from_float<Element>(w[0][n][2 * half + 1])}};
      if (seqlen_k % 2 == 0 && col < seqlen_k) {
        store_vec(row_gmem + col, pair);
      } else {
        if (col < seqlen_k) row_gmem[col] = pair[0];
        if (col + 1 < seqlen_k) row_gmem[col + 1] = pair[1];
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    attention_weights_kernel(const __grid_constant__ AttentionWeightsArgs args) {
  const ScoreArgs& scores = args.scores;
  int64_t index = blockIdx.x;
  const int col0 = static_cast<int>(index % args.key_tiles) * Traits::kBlockK;
  index /= args.key_tiles;
  const int first_row = static_cast<int>(index % args.row_tiles) * Traits::kBlockQ;
  const int64_t batch_head = index / args.row_tiles;  // or the batch alone, for the mean
  const int batch = static_cast<int>(args.average_heads ? batch_head : batch_head / scores.heads);

  float w[1][Traits::kBlockK / 8][4] = {};
  const int end_row = min(first_row + Traits::kBlockQ, scores.seqlen_q);
  const IndexRange seen = band_of(scores).keys_seen_by_any({first_row, end_row});
  if (seen.begin < col0 + Traits::kBlockK && seen.end > col0) {
    if (args.average_heads) {
      float one_head[1][Traits::kBlockK / 8][4];
      for (int head = 0; head < scores.heads; ++head) {
        head_weights<Traits>(one_head, args, batch, head, first_row, col0);
        for_each_score(w, [&](float& sum, int m, int half, int n, int e) { sum += one_head[m][n][2 * half + e]; });
      }
      const float share = 1.0f / static_cast<float>(scores.heads);
      for_each_score(w, [&](float& sum, int, int, int, int) { sum *= share; });
    } else {
      head_weights<Traits>(w, args, batch, static_cast<int>(batch_head % scores.heads), first_row, col0);
    }
  }
  store_weights<Traits>(w, args, batch_head, first_row, col0);
}

}  // namespace fastattn
