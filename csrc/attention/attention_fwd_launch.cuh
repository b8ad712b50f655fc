// Starts attention_fwd_kernel and attention_fwd_cached_kernel: the table of tiles, and for each element type and
// head_dim one unit (attention_fwd_cuda_*.cu) that instantiates its kernels.
#pragma once

#include "attention/attention_fwd_sm80.cuh"
#include "common/device.h"
#include "common/launch.cuh"

namespace fastattn {

struct FwdTile {
  int head_dim;
  ScoreKind kind;
  // For compute capabilities below this, and left out of code for others: newer code generators spill the largest
  // tiles' registers, and 12.0 has no room for what needs ...
  int below;
  // ... 160 KiB of shared memory a multiprocessor (8.0, 8.7, 9.0, 10.x), where this is true.
  bool large_smem;
  int row_tiles, warps, block_k;
  bool packed = true;  // serves packed sequences, whose lengths and addresses two tiles have no registers left for

  constexpr bool is_for(int compute_capability) const { return compute_capability < below; }
  constexpr int block_q() const { return 16 * row_tiles * warps; }
  // 128 bytes a row and panel of 64 columns.
  constexpr int smem_bytes() const { return (block_q() + 2 * block_k) * ((head_dim + 63) / 64) * 128; }
  constexpr int packed_smem_bytes() const { return smem_bytes() + static_cast<int>(sizeof(AttentionFwdArgs)); }
};

// The first tile that fits is taken. Two row tiles a warp halve the reads of shared memory for each product, and two
// blocks a multiprocessor hide each other's barriers and softmax; so a thread may have 255 registers, of which scores
// take block_k / 2 a row tile and the output head_dim / 2. Masks, ALiBi and dropout need the rest, and get one row
// tile.
// clang-format off
constexpr FwdTile kFwdTiles[] = {
    {32, ScoreKind::kPlain, 120, false, 2, 4, 128},            // 128 x 128, 48 KiB
    {64, ScoreKind::kPlain, 86, false, 2, 4, 128, false},      // 128 x 128, 48 KiB
    {64, ScoreKind::kPlain, kAnyCapability, false, 2, 4, 64},  // 128 x 64, 32 KiB
    {64, ScoreKind::kMask, kAnyCapability, false, 1, 4, 64},   // 64 x 64, 24 KiB
    {64, ScoreKind::kEverything, kAnyCapability, false, 1, 4, 64},
    {96, ScoreKind::kPlain, 100, true, 2, 4, 64},              // 128 x 64, 64 KiB
    {128, ScoreKind::kPlain, 86, true, 2, 4, 64, false},       // 128 x 64, 64 KiB
    {128, ScoreKind::kPlain, kAnyCapability, false, 2, 4, 32}, // 128 x 32, 48 KiB
    {128, ScoreKind::kMask, kAnyCapability, false, 1, 4, 64},  // 64 x 64, 48 KiB
    {128, ScoreKind::kEverything, kAnyCapability, false, 1, 4, 64},
    {192, ScoreKind::kPlain, 120, true, 1, 8, 64},  // 128 x 64, 96 KiB
    {256, ScoreKind::kPlain, 120, true, 1, 8, 64},  // 128 x 64, 128 KiB
    {256, ScoreKind::kMask, kAnyCapability, false, 1, 4, 64},  // 64 x 64, 96 KiB
    {256, ScoreKind::kEverything, kAnyCapability, false, 1, 4, 64},
};
// clang-format on
constexpr int kFwdTileCount = static_cast<int>(sizeof(kFwdTiles) / sizeof(kFwdTiles[0]));

template <typename Element, int kTile>
using FwdTraitsOf = AttentionFwdTraits<Element, kFwdTiles[kTile].head_dim, kFwdTiles[kTile].row_tiles,
                                       kFwdTiles[kTile].warps, kFwdTiles[kTile].block_k, kFwdTiles[kTile].kind>;

// Starts the kernel of kFwdTiles[tile], which has this head_dim.
template <typename Element, int kHeadDim, int kTile = 0>
const char* launch_fwd_tile(int tile, const AttentionFwdArgs& args, dim3 grid, cudaStream_t stream) {
  if constexpr (kTile == kFwdTileCount) {
    return "there is no kernel for this tile";
  } else {
    if constexpr (kFwdTiles[kTile].head_dim == kHeadDim) {
      using Traits = FwdTraitsOf<Element, kTile>;
      static_assert(Traits::kSmemBytes == kFwdTiles[kTile].smem_bytes());
      using Cards = Below<kFwdTiles[kTile].below>;
      if constexpr (kFwdTiles[kTile].packed) {
        using Packed = PackedTraits<Traits, AttentionFwdArgs>;
        static_assert(Packed::kSmemBytes == kFwdTiles[kTile].packed_smem_bytes());
        if (tile == kTile && is_packed(args.packed)) {
          return launch_kernel(attention_fwd_kernel<Packed, Cards>, grid, Packed::kThreads, Packed::kSmemBytes, stream,
                               args);
        }
      }
      if (tile == kTile) {
        return launch_kernel(attention_fwd_kernel<Traits, Cards>, grid, Traits::kThreads, Traits::kSmemBytes, stream,
                             args);
      }
    }
    return launch_fwd_tile<Element, kHeadDim, kTile + 1>(tile, args, grid, stream);
  }
}

// The kernels for caches have the tile of one row tile a warp, which fits every card: 64 x 64, or 64 x 32 where 64 keys
// would leave too few registers.
template <typename Element, int kHeadDim, ScoreKind kKind>
const char* launch_fwd_cached(const AttentionFwdArgs& args, dim3 grid, cudaStream_t stream) {
  constexpr int kBlockK = kHeadDim > 128 && kKind == ScoreKind::kEverything ? 32 : 64;
  using Traits = CachedTraits<AttentionFwdTraits<Element, kHeadDim, 1, 4, kBlockK, kKind>>;
  return launch_kernel(attention_fwd_cached_kernel<Traits>, grid, Traits::kThreads, Traits::kSmemBytes, stream, args);
}

template <typename Element, int kHeadDim>
const char* launch_fwd_cached(ScoreKind kind, const AttentionFwdArgs& args, dim3 grid, cudaStream_t stream) {
  return kind == ScoreKind::kPlain ? launch_fwd_cached<Element, kHeadDim, ScoreKind::kPlain>(args, grid, stream)
                                   : launch_fwd_cached<Element, kHeadDim, ScoreKind::kEverything>(args, grid, stream);
}

}  // namespace fastattn
