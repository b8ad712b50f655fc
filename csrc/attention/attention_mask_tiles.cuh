// Which tiles of attn_mask hide everything and which hide nothing: found once, by a kernel of its own, so that the
// attention kernels skip the former and read no mask in the latter.
//
// A mask that broadcasts over batch, heads or queries is read once, not once a head: key padding costs one row a
// sequence. For the price of reading a bool mask one time more, each of its empty tiles saves two products.
#pragma once

#include "attention/attention_scores.cuh"
#include "common/reduce.cuh"

namespace fastattn {

enum class MaskTileState : uint8_t { kHidden = 0, kPartial = 1, kFull = 2 };

// state[batch * stride_batch + tile_head * stride_head + row_tile * stride_row_tile + key_tile], strides 0 where the
// mask broadcasts. Null: there is no mask, or its tiles were not looked at and all count as partial.
struct MaskTiles {
  MaskTileState* state = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row_tile = 0;
  bool has_mask = false;
};

// Walks the visible tiles of a row of tiles. All lanes of a warp call it together, and all warps get the same answers.
template <bool kNoMask>
class MaskTileReader {
 public:
  FASTATTN_DEVICE MaskTileReader(const MaskTiles& tiles, int batch, int tile_head, int row_tile, int end)
      : end_(end), has_mask_(tiles.has_mask) {
    if (tiles.state != nullptr) {
      row_ =
          tiles.state + batch * tiles.stride_batch + tile_head * tiles.stride_head + row_tile * tiles.stride_row_tile;
    }
  }

  // Walks a column of tiles instead: row tiles up to `end`, of a block of keys.
  FASTATTN_DEVICE static MaskTileReader down_column(const MaskTiles& tiles, int batch, int tile_head, int key_tile,
                                                    int end) {
    MaskTileReader reader(tiles, batch, tile_head, 0, end);
    if (reader.row_ != nullptr) reader.row_ += key_tile;
    reader.step_ = tiles.stride_row_tile;
    return reader;
  }

  // The first tile from `tile` on that is not hidden, or `end`.
  FASTATTN_DEVICE int next(int tile) {
    if (row_ == nullptr) return tile;
    while (tile < end_) {
      if (tile >= base_ + 32) look_at(tile);
      const uint32_t ahead = visible_ >> (tile - base_);
      if (ahead != 0) return tile + __ffs(static_cast<int>(ahead)) - 1;
      tile = base_ + 32;
    }
    return end_;
  }

  // Whether the mask has to be applied to `tile`, the last that next() returned.
  FASTATTN_DEVICE bool is_partial(int tile) const {
    return row_ == nullptr ? has_mask_ : ((partial_ >> (tile - base_)) & 1) != 0;
  }

 private:
  // 32 tiles at a time, one a lane.
  FASTATTN_DEVICE void look_at(int tile) {
    base_ = tile;
    const int mine = tile + static_cast<int>(threadIdx.x) % 32;
    const MaskTileState state = mine < end_ ? row_[mine * step_] : MaskTileState::kHidden;
    visible_ = __ballot_sync(kFullWarp, state != MaskTileState::kHidden);
    partial_ = __ballot_sync(kFullWarp, state == MaskTileState::kPartial);
  }

  const MaskTileState* row_ = nullptr;
  int64_t step_ = 1;
  int end_, base_ = -32;
  uint32_t visible_ = 0, partial_ = 0;
  bool has_mask_;
};

template <>
class MaskTileReader<true> {
 public:
  FASTATTN_DEVICE MaskTileReader(const MaskTiles&, int, int, int, int) {}
  FASTATTN_DEVICE static MaskTileReader down_column(const MaskTiles& tiles, int, int, int, int) {
    return MaskTileReader(tiles, 0, 0, 0, 0);
  }
  FASTATTN_DEVICE int next(int tile) { return tile; }
  FASTATTN_DEVICE bool is_partial(int) const { return false; }
};

// ---- finding the states

struct MaskTilesArgs {
  ScoreArgs scores;
  MaskTileState* state = nullptr;
  int block_q = 0, block_k = 0, group = 1;                      // rows and keys of a tile; heads packed into its rows
  int key_tiles = 0, row_tiles = 0, tile_heads = 0, batch = 0;  // of `state`: 1 where the mask broadcasts
  bool one_row = false;                                         // every row of a tile has the same mask
};

FASTATTN_DEVICE bool hides(BoolMaskElement element) { return element.attend == 0; }
FASTATTN_DEVICE bool changes_nothing(BoolMaskElement element) { return element.attend != 0; }
template <typename Element>
FASTATTN_DEVICE bool hides(Element element) {
  return to_float(element) == -INFINITY;
}
template <typename Element>
FASTATTN_DEVICE bool changes_nothing(Element element) {
  return to_float(element) == 0.0f;
}

constexpr int kMaskTilesWarps = 4;

// One block a tile; each warp reads every fourth row, each lane every 32nd key.
template <typename Element>
__global__ void __launch_bounds__(32 * kMaskTilesWarps) mask_tiles_kernel(const __grid_constant__ MaskTilesArgs args) {
  FASTATTN_SHARED(warp_states, int[kMaskTilesWarps]);
  const ScoreArgs& scores = args.scores;
  const AttentionMask& mask = scores.mask;
  int64_t index = blockIdx.x;
  const int key_tile = static_cast<int>(index % args.key_tiles);
  index /= args.key_tiles;
  const int row_tile = static_cast<int>(index % args.row_tiles);
  index /= args.row_tiles;
  const int tile_head = static_cast<int>(index % args.tile_heads), batch = static_cast<int>(index / args.tile_heads);

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const QueryRows tile_rows = {0, tile_head * args.group, args.group};
  const int first_row = row_tile * args.block_q, first_key = key_tile * args.block_k;
  const int end_row = args.one_row ? 1 : min(first_row + args.block_q, scores.seqlen_q * args.group);
  const int end_key = min(first_key + args.block_k, scores.seqlen_k);
  const Element* mask_gmem = static_cast<const Element*>(mask.data) + batch * mask.stride_batch;
  bool any_visible = false, all_neutral = true;
  for (int row = first_row + warp; row < end_row; row += kMaskTilesWarps) {
    const Element* row_gmem =
        mask_gmem + tile_rows.head_of(row) * mask.stride_head + tile_rows.query_of(row) * mask.stride_q;
    for (int key = first_key + lane; key < end_key; key += 32) {
      const Element element = row_gmem[key * mask.stride_k];
      any_visible |= !hides(element);
      all_neutral &= changes_nothing(element);
    }
  }
  any_visible = __any_sync(kFullWarp, any_visible);
  all_neutral = __all_sync(kFullWarp, all_neutral);
  if (lane == 0) warp_states[warp] = (any_visible ? 1 : 0) | (all_neutral ? 2 : 0);
  __syncthreads();
  if (threadIdx.x == 0) {
    int any = 0, all = 2;
    for (int i = 0; i < kMaskTilesWarps; ++i) {
      any |= warp_states[i] & 1;
      all &= warp_states[i];
    }
    args.state[blockIdx.x] = any == 0   ? MaskTileState::kHidden
                             : all != 0 ? MaskTileState::kFull
                                        : MaskTileState::kPartial;
  }
}

}  // namespace fastattn
