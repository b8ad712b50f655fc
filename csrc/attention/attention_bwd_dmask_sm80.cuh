// Gradient of a floating mask:  dmask = dS, summed over the dimensions in which the mask broadcasts. (Where these
// include the keys, attention_bwd_row_mask_kernel needs no dS.)
// Work:    a block owns 64 x 64 places of the mask and visits every tile of scores that shares them: over batch and
//          heads, and over queries too where the mask has one row. It recomputes S and dP of each and adds dS in
//          registers, in fp32, in one order. Where places are too few to fill the card, `splits` blocks share the tiles
//          of a place, and reduce_splits_kernel adds their sums, in order.
// Memory:  dot products go through 64 columns of head_dim at a time, in three stages, as in a matrix product: so one
//          kernel serves every head_dim.
// Order:   what a block walks over (DmaskWalk); how sums leave (store_dmask); a step; the kernel.
#pragma once

#include "attention/attention_bwd_sm80.cuh"

namespace fastattn {

constexpr int kDmaskTile = 64, kDmaskStages = 3;
constexpr int kDmaskWarpRows = 2, kDmaskWarpCols = 2;  // of 32 x 32 scores
constexpr int kDmaskThreads = 32 * kDmaskWarpRows * kDmaskWarpCols;
using DmaskTile = SharedTile<kDmaskTile, SharedTile<8, 64>::kPanelCols>;
constexpr int kDmaskStageBytes = 2 * DmaskTile::kBytes;
constexpr int kDmaskSmemBytes = kDmaskStages * kDmaskStageBytes;
using DmaskSums = float[2][4][4];

// (batch, head, query tile, key tile).
struct TileIndex {
  int batch, head, query, key;

  FASTATTN_HOST_DEVICE int64_t count() const { return int64_t{batch} * head * query * key; }
  // The index-th of so many, the last fastest.
  FASTATTN_DEVICE TileIndex at(int64_t index) const {
    TileIndex result;
    result.key = static_cast<int>(index % key), index /= key;
    result.query = static_cast<int>(index % query), index /= query;
    result.head = static_cast<int>(index % head);
    result.batch = static_cast<int>(index / head);
    return result;
  }
};

struct DmaskArgs {
  AttentionBwdArgs bwd;
  TileIndex places = {1, 1, 1, 1};   // tiles of the mask: 1 where it broadcasts
  TileIndex sharers = {1, 1, 1, 1};  // tiles of scores to each place: 1 where it does not
  int splits = 1;
  // Of split i at out + i * elements.
  float* out = nullptr;
  int64_t elements = 0;
  int64_t stride_batch = 0, stride_head = 0, stride_q = 0, stride_k = 0;
};

// Walks the visible tiles of scores that share a place, and of each the 64-column chunks of q k^T, then of dO v^T.
struct DmaskWalk {
  const DmaskArgs& args;
  TileIndex place;
  int64_t sharer, end;
  int chunk = 0;
  TileIndex tile;

  FASTATTN_DEVICE DmaskWalk(const DmaskArgs& args_, TileIndex place_, int64_t begin, int64_t end_)
      : args(args_), place(place_), sharer(begin), end(end_) {
    find();
  }
  FASTATTN_DEVICE bool done() const { return sharer >= end; }
  FASTATTN_DEVICE int q_chunks() const { return (args.bwd.head_dim + 63) / 64; }
  FASTATTN_DEVICE int chunks() const { return q_chunks() + (args.bwd.head_dim_v + 63) / 64; }
  FASTATTN_DEVICE void advance() {
    if (++chunk < chunks()) return;
    chunk = 0;
    ++sharer;
    find();
  }
  FASTATTN_DEVICE IndexRange queries() const {
    return clip_range(tile.query * kDmaskTile, (tile.query + 1) * kDmaskTile, args.bwd.scores.seqlen_q);
  }
  FASTATTN_DEVICE IndexRange keys() const {
    return clip_range(tile.key * kDmaskTile, (tile.key + 1) * kDmaskTile, args.bwd.scores.seqlen_k);
  }

 private:
  FASTATTN_DEVICE void find() {
    for (; sharer < end; ++sharer) {
      const TileIndex shared = args.sharers.at(sharer);
      tile = {place.batch + shared.batch, place.head + shared.head, place.query + shared.query, place.key + shared.key};
      const IndexRange seen = band_of(args.bwd.scores).keys_seen_by_any(queries());
      if (seen.begin < keys().end && seen.end > keys().begin) return;
    }
  }
};

// Sums over rows, of which the mask has one, within the warp: every place then holds its sum in the first row of the
// warp's tile.
FASTATTN_DEVICE void sum_rows(DmaskSums& sums) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sums[0][n][e] + sums[0][n][2 + e] + sums[1][n][e] + sums[1][n][2 + e];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
      sums[0][n][e] = sum;
    }
  }
}

// Sums of the four warps meet in shared memory, 64 x 64 floats, and leave from there, added up over rows where the mask
// has one.
FASTATTN_DEVICE void store_dmask(DmaskSums& sums, const DmaskArgs& args, TileIndex place, int split, uint8_t* smem,
                                 int warp_row, int warp_col) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = warp_row + lane / 4, col = warp_col + lane_column();
  const bool one_row = args.stride_q == 0;
  if (one_row) sum_rows(sums);
  float* sums_smem = reinterpret_cast<float*>(smem);
  for_each_score(sums, [&](float& sum, int m, int half, int n, int e) {
    sums_smem[(row + 16 * m + 8 * half) * kDmaskTile + col + 8 * n + e] = sum;
  });
  __syncthreads();

  float* out = args.out + split * args.elements + place.batch * args.stride_batch + place.head * args.stride_head;
  const int first_row = place.query * kDmaskTile, first_col = place.key * kDmaskTile;
  const int rows = one_row ? 1 : min(kDmaskTile, args.bwd.scores.seqlen_q - first_row);
  const int cols = min(kDmaskTile, args.bwd.scores.seqlen_k - first_col);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kDmaskTile; i += kDmaskThreads) {
    const int r = i / kDmaskTile, c = i % kDmaskTile;
    if (c >= cols) continue;
    // The other warps' shares.
    float sum = sums_smem[i];
    if (one_row) sum += sums_smem[i + 32 * kDmaskTile];
    out[(first_row + r) * args.stride_q + (first_col + c) * args.stride_k] = sum;
  }
}

// ---- one step: a chunk of a tile of scores

// A stage in shared memory: 64 columns of 64 rows of q and of k, or of dO and of v.
struct DmaskStage {
  DmaskTile left, right;
};
FASTATTN_DEVICE DmaskStage dmask_stage(uint32_t smem_base, int stage) {
  const DmaskTile left{smem_base + stage * kDmaskStageBytes};
  return {left, DmaskTile{left.address + DmaskTile::kBytes}};
}

// Copies the chunk at which `ahead` stands and moves it on; starts a group even where there is none, so that groups can
// be counted.
template <typename Element>
FASTATTN_DEVICE void load_ahead(DmaskWalk& ahead, DmaskStage stage) {
  const AttentionBwdArgs& bwd = ahead.args.bwd;
  if (!ahead.done()) {
    const TileIndex& tile = ahead.tile;
    const int head_kv = tile.head / (bwd.heads / bwd.heads_kv);
    const bool is_v = ahead.chunk >= ahead.q_chunks();
    const int col = (is_v ? ahead.chunk - ahead.q_chunks() : ahead.chunk) * DmaskTile::kPanelCols;
    const AttentionTensor &left = is_v ? bwd.dout : bwd.q, &right = is_v ? bwd.v : bwd.k;
    const int cols = (is_v ? bwd.head_dim_v : bwd.head_dim) - col;
    const int query = tile.query * kDmaskTile, key = tile.key * kDmaskTile;
    load_tile<kDmaskThreads>(stage.left,
                             head_gmem<const Element>(left, tile.batch, tile.head) + query * left.stride_row + col,
                             left.stride_row, bwd.scores.seqlen_q - query, cols);
    load_tile<kDmaskThreads>(stage.right,
                             head_gmem<const Element>(right, tile.batch, head_kv) + key * right.stride_row + col,
                             right.stride_row, bwd.scores.seqlen_k - key, cols);
    ahead.advance();
  }
  cp_async_commit_group();
}

// s and dp of a whole tile become dS, which joins the sums, and are cleared for the next tile.
FASTATTN_DEVICE void add_tile(DmaskSums& sums, DmaskSums& s, DmaskSums& dp, const AttentionBwdArgs& bwd,
                              const DropoutState& dropout, const TileIndex& tile, int warp_row, int warp_col) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t batch_head = int64_t{tile.batch} * bwd.heads + tile.head;
  const int row = tile.query * kDmaskTile + warp_row + lane / 4;
  float no_row_sums[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const float *lse = bwd.lse_log2 + batch_head * bwd.padded_rows + row + 16 * m,
                *delta = bwd.delta + batch_head * bwd.padded_rows + row + 16 * m;
    const QueryRows rows = {row + 16 * m, tile.head, 1};
    make_score_gradients<ScoreKind::kEverything, /*kOfMask=*/true>(
        s[m], dp[m], bwd.scores, dropout, rows, tile.batch, tile.key * kDmaskTile + warp_col, /*is_masked=*/true,
        /*is_cut=*/true, {lse[0], lse[8]}, {delta[0], delta[8]}, /*sums=*/false, no_row_sums);
  }
  for_each_score(sums, [&](float& sum, int m, int half, int n, int e) {
    sum += s[m][n][2 * half + e];
    s[m][n][2 * half + e] = dp[m][n][2 * half + e] = 0.0f;
  });
}

// ---- the kernel

template <typename Element>
__global__ void __launch_bounds__(kDmaskThreads, 2) attention_bwd_dmask_kernel(const __grid_constant__ DmaskArgs args) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const uint32_t smem_base = smem_address(smem);
  const int split = static_cast<int>(blockIdx.y);
  const TileIndex place = args.places.at(blockIdx.x);
  const int64_t sharers = args.sharers.count();
  DmaskWalk walk(args, place, sharers * split / args.splits, sharers * (split + 1) / args.splits), ahead = walk;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / kDmaskWarpCols * 32, warp_col = warp % kDmaskWarpCols * 32;
  const DropoutState dropout = load_dropout_state(args.bwd.scores);
#pragma unroll
  for (int stage = 0; stage < kDmaskStages - 1; ++stage) load_ahead<Element>(ahead, dmask_stage(smem_base, stage));

  DmaskSums sums = {}, s = {}, dp = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kDmaskStages) {
    cp_async_wait_group<kDmaskStages - 2>();
    __syncthreads();  // this chunk is there for everyone; everyone has done with the one before, whose stage is next
    load_ahead<Element>(ahead, dmask_stage(smem_base, (stage + kDmaskStages - 1) % kDmaskStages));

    const DmaskStage tiles = dmask_stage(smem_base, stage);
    const FragmentLoader<Fragment::kA, DmaskTile> left(tiles.left, warp_row);
    const FragmentLoader<Fragment::kB, DmaskTile> right(tiles.right, warp_col);
    if (walk.chunk < walk.q_chunks()) {
      multiply_tiles<Element, DmaskTile::kCols>(s, left, right);
    } else {
      multiply_tiles<Element, DmaskTile::kCols>(dp, left, right);
    }
    if (walk.chunk == walk.chunks() - 1) add_tile(sums, s, dp, args.bwd, dropout, walk.tile, warp_row, warp_col);
    walk.advance();
  }
  cp_async_wait_group<0>();
  __syncthreads();  // everyone has done with the stages, whose place becomes the sums'
  store_dmask(sums, args, place, split, smem, warp_row, warp_col);
}

constexpr int kReduceSplitsThreads = 256;

// out = sum of the splits, in order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    reduce_splits_kernel(float* out, const float* partial, int64_t elements, int splits) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += partial[split * elements + i];
  out[i] = sum;
}

}  // namespace fastattn
