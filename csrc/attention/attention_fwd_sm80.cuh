// Forward attention for compute capability 8.0 and newer:  out = softmax(scores) v,  lse = log-sum-exp of each row.
// Work:    one block per (batch, head, kBlockQ query rows, part of the keys); each warp owns 16 kRowTiles rows and
//          visits every key tile, so that no warp waits for another's softmax.
// Memory:  q, one tile of k and one of v in shared memory. While a warp multiplies by k the copy of v runs, while it
//          exponentiates and multiplies by v that of the next k; two blocks a multiprocessor fill each other's gaps.
// Numbers: fp16/bf16 inputs, fp32 scores, softmax and accumulation; probabilities are rounded for the product with v.
// Order:   what a block works on and copies (FwdBlock, FwdCopies), scores, the way out, the kernel, whose loop is
//          attention_sm80.md's picture of the forward. softmax.cuh has the softmax, attention_combine.cuh joins parts.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1.
#pragma once

#include "attention/attention_cached_sm80.cuh"
#include "attention/attention_fwd_order.cuh"
#include "attention/attention_mask_tiles.cuh"
#include "attention/attention_packed.cuh"
#include "attention/attention_products_sm80.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

template <typename Element_, int kHeadDim_, int kRowTiles_, int kWarps_, int kBlockK_, ScoreKind kKind_>
struct AttentionFwdTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kWarps = kWarps_, kBlockK = kBlockK_;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kCached = false, kPacked = false, kNoMask = kKind == ScoreKind::kPlain;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = 16 * kRowTiles * kWarps;
  using TileQ = SharedTile<kBlockQ, kHeadDim>;  // later the output's
  using TileK = SharedTile<kBlockK, kHeadDim>;
  static constexpr int kSmemBytes = TileQ::kBytes + 2 * TileK::kBytes;
  // A multiprocessor; 0 leaves it to the compiler, which would spill a few registers here to get one more.
  static constexpr int kMinBlocks = kKind != ScoreKind::kEverything ? 0 : kHeadDim > 64 ? 2 : 3;
  static_assert(kBlockK % 32 == 0, "a draw of dropout serves 32 columns");
};

// The traits of a kernel that reads keys and values where a cache has them.
template <typename Traits>
struct CachedTraits : Traits {
  static constexpr bool kCached = true, kNoMask = true;
  // One more block of the smallest tile with everything would make the compiler spill, and so would on 12.0 a third at
  // head_dim 128, which shared memory has no room for.
  static constexpr bool kTwoBlocks =
      Traits::kKind == ScoreKind::kEverything || (kCodeCapability >= 120 && Traits::kHeadDim == 128);
  static constexpr int kMinBlocks = kTwoBlocks ? 2 : Traits::kMinBlocks;
};

struct AttentionFwdArgs {
  ScoreArgs scores;
  AttentionTensor q, k, v, out;
  float* lse = nullptr;
  const float* sinks = nullptr;
  int batch = 0, heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  bool out_is_aligned = false;  // its rows can be written 16 bytes at a time

  int group = 1;  // heads packed into the rows of a tile (1: none), ...
  uint32_t group_inverse = 0;
  FwdOrder order;  // ... so heads / group tile heads
  // With splits > 1, normalised parts (splits, batch, heads, seqlen_q, partial_stride) and their lse in base 2.
  int splits = 1;
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
  int partial_stride = 0;
  MaskTiles mask_tiles;
  KvCache cache;
  bool cache_is_aligned = false;  // its rows can be read 16 bytes at a time
  PackedSequences packed;
  int* next_place = nullptr;  // of packed sequences on Hopper: how many places were taken beyond the blocks' first
};

// Makes args those of batch entry `batch` alone.
FASTATTN_DEVICE void narrow_to_entry(AttentionFwdArgs& args, int batch) {
  const EntryRows first = narrow_to_entry(args.scores, args.packed, batch);
  skip_rows(args.q, first.query);
  skip_rows(args.out, first.query);
  skip_rows(args.k, first.key);
  skip_rows(args.v, first.key);
  args.lse += first.query;
}

// Key tiles [begin, end) to visit, and those of them [full_begin, full_end) that the band does not cut.
struct KeyTiles {
  int begin, end, full_begin, full_end;
};

template <int kBlockK>
FASTATTN_DEVICE KeyTiles key_tiles(const ScoreArgs& scores, IndexRange queries) {
  const Band band = band_of(scores);
  const IndexRange any = band.keys_seen_by_any(queries), all = band.keys_seen_by_all(queries);
  const int begin = static_cast<int>(any.begin) / kBlockK;
  const int end = any.end > any.begin ? (static_cast<int>(any.end) + kBlockK - 1) / kBlockK : begin;
  return {begin, end, (static_cast<int>(all.begin) + kBlockK - 1) / kBlockK, static_cast<int>(all.end) / kBlockK};
}

// Of them, the part of one of the blocks that share them.
template <int kBlockK>
FASTATTN_DEVICE KeyTiles key_tiles(const ScoreArgs& scores, IndexRange queries, int split, int splits) {
  KeyTiles tiles = key_tiles<kBlockK>(scores, queries);
  const int count = tiles.end - tiles.begin;
  tiles.end = tiles.begin + static_cast<int>(int64_t{count} * (split + 1) / splits);
  tiles.begin += static_cast<int>(int64_t{count} * split / splits);
  return tiles;
}

// ---- what a block does

// The shared memory of one block, its rows, and the key tiles that it visits.
template <typename Traits>
struct FwdBlock {
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;

  const uint32_t smem_base;
  const AttentionFwdArgs& args;
  const AttentionFwdArgs& own;  // args as they are for the batch entry; in a dense batch the same object
  const FwdWork& work;

  const TileQ q_tile{smem_base};
  const TileK k_tile{q_tile.address + TileQ::kBytes};
  const TileK v_tile{k_tile.address + TileK::kBytes};
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Packing is for short sequences, which the plain tiles are too large for but of caches; a constant spares them the
  // divisions.
  const int group = Traits::kKind == ScoreKind::kPlain && !Traits::kCached ? 1 : args.group;
  const int head_kv = group > 1 ? work.tile_head : work.tile_head / (args.heads / args.heads_kv);
  const int first_row = work.row_tile * Traits::kBlockQ;
  const int rows = min(Traits::kBlockQ, own.scores.seqlen_q* group - first_row);
  const QueryRows tile_rows = {first_row, work.tile_head * group, group};
  // This warp's rows, counted from the tile's first; this lane's.
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * Traits::kRowTiles;
  const QueryRows lane_rows = {first_row + warp_row + lane / 4, tile_rows.head, group};
  const KeyTiles tiles = key_tiles<Traits::kBlockK>(
      own.scores, {tile_rows.query_of(first_row), tile_rows.query_of(first_row + rows - 1) + 1}, work.split,
      args.splits);
};

// q, k and v on their way to shared memory: each function starts one group of copies.
template <typename Traits>
struct FwdCopies {
  using Element = typename Traits::Element;
  const FwdBlock<Traits>& block;
  // Packed sequences share one entry of the tensors, and a cache's table knows its own.
  const int query_entry = Traits::kPacked ? 0 : block.work.batch;
  const int key_entry = Traits::kPacked || Traits::kCached ? 0 : block.work.batch;

  // Where the entry starts. The head's address as a member would make the largest tile spill.
  const void* const k_data = block.own.k.data;
  const void* const v_data = block.own.v.data;

  FASTATTN_DEVICE void load_q() const {
    const AttentionFwdArgs& args = block.args;
    const Element* q_gmem = static_cast<const Element*>(block.own.q.data) + query_entry * args.q.stride_batch;
    load_tile_rows<Traits::kThreads>(block.q_tile, block.rows, args.head_dim, [&](int row) {
      return q_gmem + block.tile_rows.head_of(block.first_row + row) * args.q.stride_head +
             block.tile_rows.query_of(block.first_row + row) * args.q.stride_row;
    });
    cp_async_commit_group();
  }
  FASTATTN_DEVICE void load_k(int tile) const { load(block.k_tile, k_data, block.args.k, tile, block.args.head_dim); }
  FASTATTN_DEVICE void load_v(int tile) const { load(block.v_tile, v_data, block.args.v, tile, block.args.head_dim_v); }

 private:
  // The strides are the same for all entries and come from constant memory.
  FASTATTN_DEVICE void load(typename Traits::TileK dst, const void* data, const AttentionTensor& tensor, int tile,
                            int cols) const {
    const AttentionFwdArgs& args = block.args;
    const int key = tile * Traits::kBlockK, rows = block.own.scores.seqlen_k - key;
    const Element* gmem =
        static_cast<const Element*>(data) + key_entry * tensor.stride_batch + block.head_kv * tensor.stride_head;
    if constexpr (Traits::kCached) {
      const CachedRows<Element> cached = {args.cache,       gmem, tensor.stride_batch, tensor.stride_row,
                                          block.work.batch, key};
      FASTATTN_DYNAMIC_SMEM(smem);
      if (args.cache_is_aligned) {
        load_cached_tile<Traits::kThreads>(dst, cached, rows, cols);
      } else {
        load_unaligned_cached_tile<Traits::kThreads>(dst, smem + (dst.address - block.smem_base), cached, rows, cols);
      }
    } else {
      load_tile<Traits::kThreads>(dst, gmem + key * tensor.stride_row, tensor.stride_row, rows, cols);
    }
    cp_async_commit_group();
  }
};

// ---- scores

// What lies between the product and the softmax. apply_mask() is called where attn_mask has its turn; `cut`: the band
// changes this tile. Plain scores are not even scaled: the softmax does that.
template <ScoreKind kKind, int kRowTiles, int kColTiles, typename ApplyMask>
FASTATTN_DEVICE void modify_scores(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& scores, const QueryRows& rows,
                                   int batch, int col0, bool cut, ApplyMask apply_mask) {
  if constexpr (kKind != ScoreKind::kPlain) {
    scale_scores<kKind == ScoreKind::kEverything>(s, scores);
    if (kKind == ScoreKind::kEverything && scores.alibi_slopes != nullptr) add_alibi(s, scores, rows, batch, col0);
    apply_mask();
  }
  if (cut) hide_outside_band(s, scores, rows, col0);
}

// `masked`: attn_mask changes this tile.
template <ScoreKind kKind, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void modify_scores(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& scores, const QueryRows& rows,
                                   int batch, int col0, bool masked, bool cut) {
  modify_scores<kKind>(s, scores, rows, batch, col0, cut, [&] {
    if (masked) apply_mask(s, scores, rows, batch, col0);
  });
}

// The softmax before the first key: a sink is as if it had been seen, by one of the parts of the keys.
template <typename Traits>
FASTATTN_DEVICE void start_softmax(OnlineSoftmax<Traits::kRowTiles>& softmax, const FwdBlock<Traits>& block) {
  const float* sinks = block.args.sinks;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool has_sink = sinks != nullptr && block.work.split == 0;
      const int head = block.lane_rows.head_of(block.lane_rows.row(m, half));
      softmax.start(m, half, has_sink ? sinks[head] * kLog2E : -INFINITY);
    }
  }
}

// ---- writing the result

// Through q's tile, of which a warp reads and writes its own rows alone. Rows are addressed here and not by an object
// that store_accumulators asks, which cost the largest tiles registers that they do not have.
template <typename Traits>
FASTATTN_DEVICE void store_out(const float (&o)[Traits::kRowTiles][Traits::kHeadDim / 8][4],
                               const FwdBlock<Traits>& block, const FwdCopies<Traits>& copies) {
  using Element = typename Traits::Element;
  const AttentionFwdArgs& args = block.args;
  FASTATTN_DYNAMIC_SMEM(smem);
  stage_accumulators<Element>(o, 1.0f, block.q_tile, smem, block.warp_row, static_cast<int>(threadIdx.x) % 32);
  Element* out_gmem = static_cast<Element*>(block.own.out.data) + copies.query_entry * args.out.stride_batch;
  constexpr int kChunks = Traits::kHeadDim / 8;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < 16 * Traits::kRowTiles * kChunks; i += 32) {
    const int row = block.warp_row + i / kChunks, col = i % kChunks * 8;
    if (row >= block.rows || col >= args.head_dim_v) continue;
    const int tile_row = block.first_row + row;
    Element* dst = out_gmem + block.tile_rows.head_of(tile_row) * args.out.stride_head +
                   block.tile_rows.query_of(tile_row) * args.out.stride_row + col;
    store_staged_chunk(dst, staged_place(block.q_tile, smem, row, col), args.head_dim_v - col, args.out_is_aligned);
  }
}

// A part of the keys' result, for combine_splits_kernel.
template <int kColTiles>
FASTATTN_DEVICE void store_partial_row(const float (&o)[kColTiles][4], int half, const AttentionFwdArgs& args,
                                       int64_t partial_row) {
  float* dst = args.partial_out + partial_row * args.partial_stride + lane_column();
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
    if (8 * n < args.head_dim_v) store_vec(dst + 8 * n, Vec<float, 2>{{o[n][2 * half], o[n][2 * half + 1]}});
  }
}

// Normalises o and writes lse; of a part of the keys, its lse and o for combine_splits_kernel. The lane is block's
// because reading threadIdx again made the largest tiles spill.
template <typename Traits>
FASTATTN_DEVICE void finish_rows(float (&o)[Traits::kRowTiles][Traits::kHeadDim / 8][4],
                                 const OnlineSoftmax<Traits::kRowTiles>& softmax, const FwdBlock<Traits>& block) {
  const AttentionFwdArgs& args = block.args;
  const QueryRows& rows = block.lane_rows;
  float* const lse = block.own.lse;
  const int seqlen_q = args.scores.seqlen_q, end_row = block.first_row + block.rows;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax.total(m, half), lse_log2 = softmax.lse_log2(m, half, total);
      // A row that saw nothing has o = 0. Not total > 0, which would turn NaN into 0.
      const float normaliser = total == 0.0f ? 0.0f : args.scores.dropout_scale / total;
#pragma unroll
      for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
        o[m][n][2 * half] *= normaliser;
        o[m][n][2 * half + 1] *= normaliser;
      }
      const int row = rows.row(m, half);
      if (row >= end_row) continue;
      const int64_t batch_head = int64_t{block.work.batch} * args.heads + rows.head_of(row);
      const int64_t result_row = batch_head * seqlen_q + rows.query_of(row);
      const bool first_lane = block.lane % 4 == 0;
      if (args.splits > 1) {
        const int64_t partial_row = block.work.split * int64_t{args.batch} * args.heads * seqlen_q + result_row;
        if (first_lane) args.partial_lse[partial_row] = lse_log2;
        store_partial_row(o[m], half, args, partial_row);
      } else if (first_lane) {
        const int64_t packed_row = rows.head_of(row) * args.packed.q.total + rows.query_of(row);
        lse[Traits::kPacked ? packed_row : result_row] = lse_log2 * kLn2;
      }
    }
  }
}

// ---- the kernel

template <typename Traits>
FASTATTN_DEVICE void attention_fwd_block(const AttentionFwdArgs& args, const AttentionFwdArgs& own,
                                         const FwdWork& work) {
  using Element = typename Traits::Element;
  using TileK = typename Traits::TileK;
  constexpr int kRowTiles = Traits::kRowTiles, kBlockK = Traits::kBlockK;
  constexpr bool kDrops = Traits::kKind == ScoreKind::kEverything && !Traits::kCached;
  constexpr bool kPlain = Traits::kKind == ScoreKind::kPlain;
  FASTATTN_DYNAMIC_SMEM(smem);
  const FwdBlock<Traits> block{smem_address(smem), args, own, work};
  const FwdCopies<Traits> copies{block};
  const KeyTiles& tiles = block.tiles;

  copies.load_q();
  MaskTileReader<Traits::kNoMask> visible(args.mask_tiles, work.batch, work.tile_head, work.row_tile, tiles.end);
  int tile = visible.next(tiles.begin);
  if (tile < tiles.end) copies.load_k(tile);

  OnlineSoftmax<kRowTiles> softmax;
  start_softmax(softmax, block);
  DropoutState dropout;
  if constexpr (kDrops) dropout = load_dropout_state(args.scores);
  const FragmentLoader<Fragment::kA, typename Traits::TileQ> q_fragments(block.q_tile, block.warp_row);
  const FragmentLoader<Fragment::kB, TileK> k_fragments(block.k_tile);
  float o[kRowTiles][Traits::kHeadDim / 8][4] = {};

  while (tile < tiles.end) {
    const int col0 = tile * kBlockK;
    const bool masked = visible.is_partial(tile);
    cp_async_wait_group<0>();
    __syncthreads();  // k is there for everyone, and everyone has done with the last v
    copies.load_v(tile);

    float s[kRowTiles][kBlockK / 8][4];
    for_each_score(s, [](float& x, int, int, int, int) { x = 0.0f; });
    multiply_tiles<Element, Traits::kHeadDim>(s, q_fragments, k_fragments);
    const bool cut = tile < tiles.full_begin || tile >= tiles.full_end;
    modify_scores<Traits::kKind>(s, tile_scores<Traits>(args.scores, own.scores), block.lane_rows, work.batch, col0,
                                 masked, cut);

    cp_async_wait_group<0>();
    __syncthreads();  // v is there for everyone, and everyone has done with this k
    tile = visible.next(tile + 1);
    if (tile < tiles.end) copies.load_k(tile);

    const float factor = kPlain ? args.scores.scale_log2 : 1.0f;
    float correction[kRowTiles][2];
    if (softmax.raise(s, factor, correction)) {
      for_each_score(o, [&](float& x, int m, int half, int, int) { x *= correction[m][half]; });
    }
    softmax.exponentiate(s, factor);
    if constexpr (kDrops) {
      if (args.scores.dropout_threshold > 0) {
        drop_probabilities(s, args.scores, dropout, block.lane_rows, work.batch, col0);
      }
    }
    // Constructed here, since one register less across the loop decides whether the large tiles spill.
    const FragmentLoader<Fragment::kBTransposed, TileK> v_fragments(block.v_tile);
    multiply_accumulators<Element>(o, s, v_fragments);
  }
  cp_async_wait_group<0>();
  __syncthreads();  // where no key was visible, q has arrived only now; its tile becomes the output's

  finish_rows(o, softmax, block);
  if (args.splits == 1) store_out(o, block, copies);
}

// Traits: AttentionFwdTraits, or PackedTraits of them.
template <typename Traits, typename Cards>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdArgs args) {
  if constexpr (Cards::kHasCode) {
    const FwdWork work = args.order.work(static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), false);
    const AttentionFwdArgs& own = entry_args<Traits>(args, work.batch);
    // The grid is that of the longest sequence.
    if (Traits::kPacked && work.row_tile * Traits::kBlockQ >= own.scores.seqlen_q * args.group) return;
    attention_fwd_block<Traits>(args, own, work);
  } else {
    never_launched();
  }
}

// Traits: CachedTraits.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    attention_fwd_cached_kernel(const __grid_constant__ AttentionFwdArgs args) {
  const FwdWork work = args.order.work(static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), false);
  AttentionFwdArgs own = args;
  narrow_to_cached(own.scores, args.cache, work.batch);
  attention_fwd_block<Traits>(args, own, work);
}

}  // namespace fastattn
