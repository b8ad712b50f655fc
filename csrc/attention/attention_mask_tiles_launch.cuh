// Host side of attention_mask_tiles.cuh: whether to look at the mask's tiles, and where their states lie.
#pragma once

#include "attention/attention_mask_tiles.cuh"
#include "common/launch.cuh"

namespace fastattn {

struct MaskTilesPlan {
  int block_q = 0, block_k = 0, group = 1;
  int64_t batch = 0, tile_heads = 0, row_tiles = 0, key_tiles = 0;  // 1 where the mask broadcasts
  bool one_row = false;
  int64_t bytes = 0;  // 0: the states are not worth finding
};

// Reading the mask once more pays for bool masks, which often hide whole tiles, and for any mask that many heads share.
inline MaskTilesPlan plan_mask_tiles(const AttentionParams& p, int block_q, int block_k, int group) {
  MaskTilesPlan plan;
  const AttentionMask& mask = p.mask;
  if (mask.data == nullptr || p.seqlen_k == 0) return plan;
  plan.block_q = block_q, plan.block_k = block_k, plan.group = group;
  plan.one_row = mask.stride_q == 0 && (group == 1 || mask.stride_head == 0);
  plan.batch = mask.stride_batch == 0 ? 1 : p.batch;
  plan.tile_heads = mask.stride_head == 0 ? 1 : p.heads / group;
  plan.row_tiles = plan.one_row ? 1 : (p.seqlen_q * group + block_q - 1) / block_q;
  plan.key_tiles = (p.seqlen_k + block_k - 1) / block_k;
  const int64_t sharers = p.batch * p.heads / (plan.batch * plan.tile_heads * group);
  const int64_t states = plan.batch * plan.tile_heads * plan.row_tiles * plan.key_tiles;
  if ((mask.dtype == DType::kBool || sharers >= 4) && states <= INT32_MAX) plan.bytes = (states + 255) / 256 * 256;
  return plan;
}

inline MaskTiles mask_tiles(const MaskTilesPlan& plan, const AttentionParams& p, MaskTileState* state) {
  MaskTiles tiles;
  tiles.has_mask = p.mask.data != nullptr;
  if (plan.bytes == 0) return tiles;
  tiles.state = state;
  tiles.stride_row_tile = plan.row_tiles == 1 ? 0 : plan.key_tiles;
  tiles.stride_head = plan.tile_heads == 1 ? 0 : plan.row_tiles * plan.key_tiles;
  tiles.stride_batch = plan.batch == 1 ? 0 : plan.tile_heads * plan.row_tiles * plan.key_tiles;
  return tiles;
}

inline const char* launch_mask_tiles(const MaskTilesPlan& plan, const ScoreArgs& scores, MaskTileState* state,
                                     cudaStream_t stream) {
  if (plan.bytes == 0) return nullptr;
  MaskTilesArgs args;
  args.scores = scores;
  args.state = state;
  args.block_q = plan.block_q, args.block_k = plan.block_k, args.group = plan.group;
  args.batch = static_cast<int>(plan.batch), args.tile_heads = static_cast<int>(plan.tile_heads);
  args.row_tiles = static_cast<int>(plan.row_tiles), args.key_tiles = static_cast<int>(plan.key_tiles);
  args.one_row = plan.one_row;
  const auto blocks = static_cast<unsigned>(plan.batch * plan.tile_heads * plan.row_tiles * plan.key_tiles);
  constexpr int kThreads = 32 * kMaskTilesWarps;
  switch (scores.mask.dtype) {
    case DType::kBool:
      return launch_kernel(mask_tiles_kernel<BoolMaskElement>, blocks, kThreads, 0, stream, args);
    case DType::kFloat32:
      return launch_kernel(mask_tiles_kernel<float>, blocks, kThreads, 0, stream, args);
    case DType::kBFloat16:
      return launch_kernel(mask_tiles_kernel<bfloat16_t>, blocks, kThreads, 0, stream, args);
    default:
      return launch_kernel(mask_tiles_kernel<half_t>, blocks, kThreads, 0, stream, args);
  }
}

}  // namespace fastattn
