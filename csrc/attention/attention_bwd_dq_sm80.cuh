// Gradient of queries:  dq_i = scale sum_j dx_ij k_j,   dx as in attention_bwd_dkv_sm80.cuh.
// Work:    one block per (batch, head, kBlockQ queries) visits the visible key tiles. A warp owns 16 kRowTiles rows,
//          and where kKeyParts = 2 half of each key tile: so eight warps fit a multiprocessor whose shared memory holds
//          one block. The two halves of dq are added at the end.
// Memory:  q and dO stay, k and v arrive in two stages. S = q k^T becomes dX in registers, where it is the left operand
//          of the product with k.
// Numbers: as in attention_bwd_dkv_sm80.cuh. Recomputing S and dP here costs two products, and saves what adding up dq
//          across blocks would cost: seqlen_k / kBlockK reads and writes of dq in fp32, in an order to be enforced.
// Order:   what a block works on and copies (BwdDqBlock, BwdDqCopies), the kernel. attention_bwd_sm80.cuh makes dX of
//          dot products.
#pragma once

#include "attention/attention_bwd_sm80.cuh"

namespace fastattn {

template <typename Element_, int kHeadDim_, int kRowTiles_, int kRowWarps_, int kKeyParts_, int kBlockK_,
          ScoreKind kKind_>
struct AttentionBwdDqTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kRowWarps = kRowWarps_, kKeyParts = kKeyParts_;
  static constexpr int kBlockK = kBlockK_;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kPacked = false, kNoMask = kKind == ScoreKind::kPlain;
  static constexpr int kThreads = 32 * kRowWarps * kKeyParts;
  static constexpr int kBlockQ = 16 * kRowTiles * kRowWarps;
  static constexpr int kWarpKeys = kBlockK / kKeyParts;
  static constexpr int kColTiles = kWarpKeys / 8;
  using TileQ = SharedTile<kBlockQ, kHeadDim>;
  using TileK = SharedTile<kBlockK, kHeadDim>;
  using Gradient = float[kRowTiles][kHeadDim / 8][4];

  // q, dO, two stages of (k, v), then lse and delta.
  static constexpr int kStageBytes = 2 * TileK::kBytes;
  static constexpr int kStagesAt = 2 * TileQ::kBytes;
  static constexpr int kStatisticsAt = kStagesAt + 2 * kStageBytes;
  static constexpr int kSmemBytes = kStatisticsAt + 2 * kBlockQ * 4;
  static_assert(kKeyParts == 1 || kRowWarps * kRowTiles * kHeadDim * 64 <= kStagesAt,
                "the halves of dq meet in q's and dO's place");
  static_assert(kRowPadding % kBlockQ == 0, "the statistics of the last tile's rows exist");
};

// ---- what a block does

// The queries of one block and the key tiles that it visits, and this warp's rows and keys. Under a causal mask the
// last queries see most keys: those blocks go first.
template <typename Traits>
struct BwdDqBlock {
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK;
  const AttentionBwdArgs& args;
  const AttentionBwdArgs& own;  // args as they are for the batch entry; in a dense batch the same object
  const int query_tile = args.query_tiles - 1 - static_cast<int>(blockIdx.x) % args.query_tiles;
  const int batch_head = static_cast<int>(blockIdx.x) / args.query_tiles;
  const int batch = batch_head / args.heads, head = batch_head % args.heads;
  const int entry = Traits::kPacked ? 0 : batch;  // of the tensors: packed sequences share one
  const int head_kv = head / (args.heads / args.heads_kv);
  const int first_query = query_tile * kBlockQ, queries = min(kBlockQ, own.scores.seqlen_q - first_query);
  const IndexRange any = band_of(own.scores).keys_seen_by_any({first_query, first_query + queries});
  const IndexRange all = band_of(own.scores).keys_seen_by_all({first_query, first_query + queries});
  // Keys that every query of the tile sees: [full_begin, full_end).
  const int full_begin = static_cast<int>(all.begin), full_end = static_cast<int>(all.end);
  const int begin = static_cast<int>(any.begin) / kBlockK;
  const int end = any.end > any.begin ? (static_cast<int>(any.end) + kBlockK - 1) / kBlockK : begin;

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int part = warp / Traits::kRowWarps, row_warp = warp % Traits::kRowWarps;
  const int warp_row = row_warp * 16 * Traits::kRowTiles, warp_key = part * Traits::kWarpKeys;
};

// The tiles in shared memory and the copies that fill them: each function starts one group.
template <typename Traits>
struct BwdDqCopies {
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;

  const uint32_t smem_base;
  const BwdDqBlock<Traits>& block;
  const TileQ q_tile{smem_base}, dout_tile{smem_base + TileQ::kBytes};

  FASTATTN_DEVICE void load_queries() const {
    const AttentionBwdArgs &args = block.args, &own = block.own;
    const int query = block.first_query, rows = block.queries;
    load_head_rows<Traits>(q_tile, own.q, args.q, block.entry, block.head, query, rows, args.head_dim);
    load_head_rows<Traits>(dout_tile, own.dout, args.dout, block.entry, block.head, query, rows, args.head_dim_v);
    load_statistics<Traits>(smem_base + Traits::kStatisticsAt, args, own, block.batch, block.head, query);
    cp_async_commit_group();
  }
  FASTATTN_DEVICE void load_keys(uint32_t stage_offset, int key_tile) const {
    const AttentionBwdArgs &args = block.args, &own = block.own;
    const int key = key_tile * Traits::kBlockK, rows = own.scores.seqlen_k - key;
    const TileK k_tile{smem_base + Traits::kStagesAt + stage_offset};
    const TileK v_tile{k_tile.address + TileK::kBytes};
    load_head_rows<Traits>(k_tile, own.k, args.k, block.entry, block.head_kv, key, rows, args.head_dim);
    load_head_rows<Traits>(v_tile, own.v, args.v, block.entry, block.head_kv, key, rows, args.head_dim_v);
    cp_async_commit_group();
  }
};

// ---- the kernel

// Adds the second half's dq to the first half's, through shared memory in the order of the registers.
template <typename Traits>
FASTATTN_DEVICE void add_key_parts(typename Traits::Gradient& dq, uint8_t* smem, int row_warp, bool is_second) {
  constexpr int kQuads = Traits::kRowTiles * Traits::kHeadDim / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float4* quads = reinterpret_cast<float4*>(smem) + row_warp * kQuads * 32 + lane;
  const auto for_each_quad = [&](auto fn) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) fn(dq[i / (Traits::kHeadDim / 8)][i % (Traits::kHeadDim / 8)], quads[i * 32]);
  };
  if (is_second) {
    for_each_quad([](const float (&own)[4], float4& shared) { shared = make_float4(own[0], own[1], own[2], own[3]); });
  }
  __syncthreads();
  if (!is_second) {
    for_each_quad([](float (&own)[4], const float4& shared) {
      const float4 other = shared;
      own[0] += other.x, own[1] += other.y, own[2] += other.z, own[3] += other.w;
    });
  }
  __syncthreads();
}

// Sums of dS over the row tile's rows `lane / 4` and `lane / 4 + 8`, of which each of four lanes has a share: one of
// the four keeps each, for the registers that the accumulators leave.
FASTATTN_DEVICE void keep_row_sums(float& kept, const float (&shares)[2], int row_tile, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = warp_reduce<4>(shares[half], Sum{});
    if (lane % 4 == 2 * row_tile + half) kept += sum;
  }
}

template <typename Traits>
FASTATTN_DEVICE void attention_bwd_dq_block(const AttentionBwdArgs& args, const AttentionBwdArgs& own) {
  using Element = typename Traits::Element;
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK, kRowTiles = Traits::kRowTiles;
  FASTATTN_DYNAMIC_SMEM(smem);
  const uint32_t smem_base = smem_address(smem);
  const BwdDqBlock<Traits> block{args, own};
  const BwdDqCopies<Traits> copies{smem_base, block};
  const int batch = block.batch, head = block.head, lane = block.lane, end = block.end;
  const int first_query = block.first_query, warp_row = block.warp_row, warp_key = block.warp_key;

  copies.load_queries();
  MaskTileReader<Traits::kNoMask> visible(args.mask_tiles, batch, head, block.query_tile, end);
  int key_tile = visible.next(block.begin);
  if (key_tile < end) copies.load_keys(0, key_tile);

  DropoutState dropout;
  if constexpr (Traits::kKind == ScoreKind::kEverything) dropout = load_dropout_state(args.scores);
  // Read again for every tile: the accumulators need the registers.
  const float* lse_smem = reinterpret_cast<const float*>(smem + Traits::kStatisticsAt) + warp_row + lane / 4;
  const FragmentLoader<Fragment::kA, TileQ> q_fragments(copies.q_tile, warp_row);
  const TileK first_stage{smem_base + Traits::kStagesAt};
  const FragmentLoader<Fragment::kB, TileK> k_fragments(first_stage, warp_key);
  const FragmentLoader<Fragment::kBTransposed, TileK> summed_fragments(first_stage, warp_key);
  typename Traits::Gradient dq = {};
  float row_sum = 0.0f;  // of row 8 * (lane % 4) + lane / 4
  static_assert(kRowTiles <= 2, "four lanes keep the sums of four rows");

  for (uint32_t stage_offset = 0; key_tile < end; stage_offset ^= Traits::kStageBytes) {
    const int tile_key = key_tile * kBlockK;
    const bool is_masked = visible.is_partial(key_tile);
    const bool is_cut = tile_key < block.full_begin || tile_key + kBlockK > block.full_end;
    cp_async_wait_group<0>();
    __syncthreads();  // this stage is there for everyone; everyone has done with the other one
    key_tile = visible.next(key_tile + 1);
    if (key_tile < end) copies.load_keys(stage_offset ^ Traits::kStageBytes, key_tile);

    float s[kRowTiles][Traits::kColTiles][4] = {}, dp[kRowTiles][Traits::kColTiles][4] = {};
    multiply_tiles<Element, Traits::kHeadDim, 4>(s, q_fragments, k_fragments.behind(stage_offset));
    multiply_tiles<Element, Traits::kHeadDim, 4>(dp, q_fragments.behind(TileQ::kBytes),
                                                 k_fragments.behind(stage_offset + TileK::kBytes));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const QueryRows rows = {first_query + warp_row + 16 * m + lane / 4, head, 1};
      const float *lse = lse_smem + 16 * m, *delta = lse + kBlockQ;
      float shares[2] = {};
      make_score_gradients<Traits::kKind, /*kOfMask=*/false>(
          s[m], dp[m], tile_scores<Traits>(args.scores, own.scores), dropout, rows, batch, tile_key + warp_key,
          is_masked, is_cut, {lse[0], lse[8]}, {delta[0], delta[8]}, args.row_sums != nullptr, shares);
      if (args.row_sums != nullptr) keep_row_sums(row_sum, shares, m, lane);
    }
    multiply_accumulators<Element>(dq, s, summed_fragments.behind(stage_offset));
  }
  if (args.row_sums != nullptr && lane % 4 < 2 * kRowTiles) {
    float* target = own.row_sums + block.part * args.row_sums_part +
                    statistics_offset<Traits::kPacked>(args, batch, head) + first_query + warp_row;
    target[8 * (lane % 4) + lane / 4] = row_sum;
  }
  cp_async_wait_group<0>();
  __syncthreads();  // everyone has done with q and dO, whose place becomes dq's

  if constexpr (Traits::kKeyParts == 2) add_key_parts<Traits>(dq, smem, warp_row / (16 * kRowTiles), warp_key != 0);
  if (warp_key == 0) {
    const TileOutput<Element> output = {
        head_gmem<Element>(own.dq, block.entry, head) + (first_query + warp_row) * args.dq.stride_row,
        args.dq.stride_row, own.scores.seqlen_q - first_query - warp_row, args.head_dim, args.dq_is_aligned};
    store_accumulators(dq, args.scale, copies.q_tile, smem, warp_row, output);
  }
}

// Traits: AttentionBwdDqTraits, or PackedTraits of them.
template <typename Traits, typename Cards>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_bwd_dq_kernel(const __grid_constant__ AttentionBwdArgs args) {
  if constexpr (Cards::kHasCode) {
    const int block = static_cast<int>(blockIdx.x), batch = block / (args.query_tiles * args.heads);
    const int query_tile = args.query_tiles - 1 - block % args.query_tiles;
    const AttentionBwdArgs& own = entry_args<Traits>(args, batch);
    // The grid is that of the longest sequence.
    if (Traits::kPacked && query_tile * Traits::kBlockQ >= own.scores.seqlen_q) return;
    attention_bwd_dq_block<Traits>(args, own);
  } else {
    never_launched();
  }
}

}  // namespace fastattn
