// Starts the kernels of the attention backward: the tables of tiles, and for each element type and head_dim one unit
// (attention_bwd_cuda_*.cu) that instantiates them.
#pragma once

#include "attention/attention_bwd_dkv_sm80.cuh"
#include "attention/attention_bwd_dq_sm80.cuh"
#include "common/device.h"
#include "common/launch.cuh"

namespace fastattn {

// Of attention_bwd_dkv_kernel. The first tile that fits the call and the card is taken.
struct BwdDkvTile {
  int head_dim;
  ScoreKind kind;
  int below;  // for compute capabilities below this, and left out of code for others, whose shared memory is too small
  int row_tiles, pairs, block_q;
  // Blocks may share queries (BwdParts), and sequences be packed: the largest tile has no registers left for either.
  bool shares = true;

  constexpr bool is_for(int compute_capability, bool packed) const {
    return compute_capability < below && (shares || !packed);
  }
  constexpr int block_k() const { return 16 * row_tiles * pairs; }
};

// A thread has 255 registers, or 168 where a block has twelve warps; the gradient takes row_tiles * head_dim / 2 of
// them, the scores row_tiles * block_q / 4. Pairs come by twos: of six warps, two of a multiprocessor's four schedulers
// have two each, and take as long as with eight.
// clang-format off
constexpr BwdDkvTile kBwdDkvTiles[] = {
    {64, ScoreKind::kPlain, kAnyCapability, 2, 4, 64},       // 128 keys x 64 queries, 97 KiB
    {64, ScoreKind::kEverything, kAnyCapability, 2, 4, 32},  // 128 x 32
    {96, ScoreKind::kPlain, 120, 2, 4, 64},                  // 128 x 64, 161 KiB, for 8.0 and 9.0
    {96, ScoreKind::kPlain, kAnyCapability, 1, 6, 32},       // 96 x 32, 93 KiB
    {128, ScoreKind::kPlain, 120, 2, 4, 64, false},          // 128 x 64, 161 KiB
    {128, ScoreKind::kPlain, 120, 2, 4, 32},                 // 128 x 32, 113 KiB
    {128, ScoreKind::kPlain, kAnyCapability, 1, 6, 32},      // 96 x 32, 93 KiB
    {128, ScoreKind::kEverything, kAnyCapability, 2, 4, 16}, // 128 x 16, 88 KiB
    {192, ScoreKind::kPlain, 120, 1, 4, 64},                 // 64 x 64, 161 KiB
    {192, ScoreKind::kPlain, kAnyCapability, 1, 4, 16},      // 64 x 16, 76 KiB
    {256, ScoreKind::kPlain, 120, 1, 4, 32},                 // 64 x 32, 137 KiB
    {256, ScoreKind::kPlain, kAnyCapability, 1, 3, 16},      // 48 x 16, 83 KiB: 64 x 16 would take 101
    {256, ScoreKind::kEverything, 120, 1, 4, 32},
    {256, ScoreKind::kEverything, kAnyCapability, 1, 3, 16},
};
// clang-format on
constexpr int kBwdDkvTileCount = static_cast<int>(sizeof(kBwdDkvTiles) / sizeof(kBwdDkvTiles[0]));

// Of attention_bwd_dq_kernel.
struct BwdDqTile {
  int head_dim;
  ScoreKind kind;
  int below;
  int row_tiles, row_warps, key_parts, block_k;

  constexpr bool is_for(int compute_capability, bool) const { return compute_capability < below; }
  constexpr int block_q() const { return 16 * row_tiles * row_warps; }
};

// The gradient takes row_tiles * head_dim / 2 registers, the scores and dP row_tiles * block_k / key_parts.
// clang-format off
constexpr BwdDqTile kBwdDqTiles[] = {
    {64, ScoreKind::kPlain, kAnyCapability, 2, 4, 1, 64},        // 128 queries x 64 keys, 64 KiB: two blocks on 8.0
    {64, ScoreKind::kEverything, kAnyCapability, 2, 4, 1, 32},   // 128 x 32, 48 KiB
    {96, ScoreKind::kPlain, 120, 2, 4, 2, 64},                   // 128 x 64, 128 KiB
    {96, ScoreKind::kPlain, kAnyCapability, 2, 4, 2, 32},        // 128 x 32, 96 KiB
    {128, ScoreKind::kPlain, 120, 2, 4, 2, 64},                  // 128 x 64, 128 KiB
    {128, ScoreKind::kPlain, kAnyCapability, 2, 4, 2, 32},       // 128 x 32, 96 KiB
    {128, ScoreKind::kEverything, kAnyCapability, 1, 4, 2, 64},  // 64 x 64, 96 KiB
    {192, ScoreKind::kPlain, 120, 1, 8, 1, 32},                  // 128 x 32, 144 KiB
    {192, ScoreKind::kPlain, kAnyCapability, 1, 4, 2, 32},       // 64 x 32, 96 KiB
    {256, ScoreKind::kPlain, 120, 1, 4, 2, 32},                  // 64 x 32, 128 KiB
    {256, ScoreKind::kPlain, kAnyCapability, 1, 4, 1, 16},       // 64 x 16, 96 KiB
    {256, ScoreKind::kEverything, 120, 1, 4, 2, 32},
    {256, ScoreKind::kEverything, kAnyCapability, 1, 4, 1, 16},
};
// clang-format on
constexpr int kBwdDqTileCount = static_cast<int>(sizeof(kBwdDqTiles) / sizeof(kBwdDqTiles[0]));

template <typename Element, int kTile>
using BwdDkvTraitsOf = AttentionBwdDkvTraits<Element, kBwdDkvTiles[kTile].head_dim, kBwdDkvTiles[kTile].row_tiles,
                                             kBwdDkvTiles[kTile].pairs, kBwdDkvTiles[kTile].block_q,
                                             kBwdDkvTiles[kTile].kind, kBwdDkvTiles[kTile].shares>;
template <typename Traits>
using PackedBwdTraits = PackedTraits<Traits, AttentionBwdArgs>;
template <typename Element, int kTile>
using BwdDqTraitsOf = AttentionBwdDqTraits<Element, kBwdDqTiles[kTile].head_dim, kBwdDqTiles[kTile].row_tiles,
                                           kBwdDqTiles[kTile].row_warps, kBwdDqTiles[kTile].key_parts,
                                           kBwdDqTiles[kTile].block_k, kBwdDqTiles[kTile].kind>;

// Shared memory of each tile, in the tables' order; of the kernels for packed sequences, which take more.
template <int... kTile>
constexpr int bwd_dkv_smem_bytes(int tile, std::integer_sequence<int, kTile...>) {
  constexpr int kBytes[] = {PackedBwdTraits<BwdDkvTraitsOf<half_t, kTile>>::kSmemBytes...};
  return kBytes[tile];
}
constexpr int bwd_dkv_smem_bytes(int tile) {
  return bwd_dkv_smem_bytes(tile, std::make_integer_sequence<int, kBwdDkvTileCount>());
}
template <int... kTile>
constexpr int bwd_dq_smem_bytes(int tile, std::integer_sequence<int, kTile...>) {
  constexpr int kBytes[] = {PackedBwdTraits<BwdDqTraitsOf<half_t, kTile>>::kSmemBytes...};
  return kBytes[tile];
}
constexpr int bwd_dq_smem_bytes(int tile) {
  return bwd_dq_smem_bytes(tile, std::make_integer_sequence<int, kBwdDqTileCount>());
}

// Starts attention_bwd_dkv_kernel of kBwdDkvTiles[tile], which has this head_dim.
template <typename Element, int kHeadDim, int kTile = 0>
const char* launch_bwd_dkv_tile(int tile, const AttentionBwdArgs& args, dim3 grid, cudaStream_t stream) {
  if constexpr (kTile == kBwdDkvTileCount) {
    return "there is no kernel for this tile";
  } else {
    if constexpr (kBwdDkvTiles[kTile].head_dim == kHeadDim) {
      using Traits = BwdDkvTraitsOf<Element, kTile>;
      using Cards = Below<kBwdDkvTiles[kTile].below>;
      if constexpr (Traits::kShares) {
        using Packed = PackedBwdTraits<Traits>;
        if (tile == kTile && is_packed(args.packed)) {
          return launch_kernel(attention_bwd_dkv_kernel<Packed, Cards>, grid, Packed::kThreads, Packed::kSmemBytes,
                               stream, args);
        }
      }
      if (tile == kTile) {
        return launch_kernel(attention_bwd_dkv_kernel<Traits, Cards>, grid, Traits::kThreads, Traits::kSmemBytes,
                             stream, args);
      }
    }
    return launch_bwd_dkv_tile<Element, kHeadDim, kTile + 1>(tile, args, grid, stream);
  }
}

// The same for attention_bwd_dq_kernel and kBwdDqTiles.
template <typename Element, int kHeadDim, int kTile = 0>
const char* launch_bwd_dq_tile(int tile, const AttentionBwdArgs& args, dim3 grid, cudaStream_t stream) {
  if constexpr (kTile == kBwdDqTileCount) {
    return "there is no kernel for this tile";
  } else {
    if constexpr (kBwdDqTiles[kTile].head_dim == kHeadDim) {
      using Traits = BwdDqTraitsOf<Element, kTile>;
      using Packed = PackedBwdTraits<Traits>;
      using Cards = Below<kBwdDqTiles[kTile].below>;
      if (tile == kTile && is_packed(args.packed)) {
        return launch_kernel(attention_bwd_dq_kernel<Packed, Cards>, grid, Packed::kThreads, Packed::kSmemBytes, stream,
                             args);
      }
      if (tile == kTile) {
        return launch_kernel(attention_bwd_dq_kernel<Traits, Cards>, grid, Traits::kThreads, Traits::kSmemBytes, stream,
                             args);
      }
    }
    return launch_bwd_dq_tile<Element, kHeadDim, kTile + 1>(tile, args, grid, stream);
  }
}

}  // namespace fastattn
