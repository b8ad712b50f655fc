// Starts attention_fwd_sm90_kernel: the table of tiles, and for each element type and head_dim one unit
// (attention_fwd_cuda_sm90_*.cu) that instantiates its kernels.
#pragma once

#include "attention/attention_fwd_sm90.cuh"
#include "common/device.h"
#include "common/launch.cuh"

namespace fastattn {

struct FwdSm90Tile {
  int head_dim;
  ScoreKind kind;
  int groups, block_k;

  constexpr int block_q() const { return 64 * groups; }
  // Sequences with lengths of their own have no mask: a tile with masks serves them, without that code, only where the
  // plain one has more warpgroups than short sequences have use for.
  constexpr bool has(Sequences sequences) const {
    return sequences == Sequences::kDense || kind != ScoreKind::kMask || head_dim == 64;
  }
  constexpr ScoreKind kind_of(Sequences sequences) const {
    return sequences != Sequences::kDense && kind == ScoreKind::kMask ? ScoreKind::kPlain : kind;
  }
  constexpr int block_k_of(Sequences sequences) const {
    if (sequences == Sequences::kDense) return block_k;
    // Of 256 with everything, the scores of 64 keys and a sequence's place are 24 bytes more than the registers hold,
    // and a draw of dropout serves 32 keys.
    const int fits = head_dim == 256 && kind == ScoreKind::kEverything ? 32 : block_k;
    // The blocks of a cache mostly have a multiple of 32 rows, of which boxes can have as many, but for tiles of 80.
    return sequences == Sequences::kCached ? fits / 32 * 32 : fits;
  }
  constexpr bool serves(int64_t head_dim_asked, ScoreKind kind_asked, int64_t rows) const {
    return head_dim >= head_dim_asked && kind >= kind_asked && rows > block_q() - 64;  // no warpgroup is idle
  }
};

// The first tile that fits is taken. A thread holds block_k / 2 scores, half as many registers of probabilities and
// head_dim / 2 of the output; of 160 registers with three warpgroups, of 232 with two.
constexpr FwdSm90Tile kFwdSm90Tiles[] = {
    {64, ScoreKind::kPlain, 3, 128},  {64, ScoreKind::kMask, 2, 128},  {64, ScoreKind::kEverything, 2, 128},
    {96, ScoreKind::kPlain, 2, 128},  {96, ScoreKind::kMask, 2, 128},  {96, ScoreKind::kEverything, 2, 128},
    {128, ScoreKind::kPlain, 2, 128}, {128, ScoreKind::kMask, 2, 128}, {128, ScoreKind::kEverything, 2, 128},
    {192, ScoreKind::kPlain, 2, 96},  {192, ScoreKind::kMask, 2, 96},  {192, ScoreKind::kEverything, 2, 96},
    {256, ScoreKind::kPlain, 2, 80},  {256, ScoreKind::kMask, 2, 64},  {256, ScoreKind::kEverything, 2, 64},
};
constexpr int kFwdSm90TileCount = static_cast<int>(sizeof(kFwdSm90Tiles) / sizeof(kFwdSm90Tiles[0]));

template <typename Element, int kTile, Sequences kSequences>
using FwdSm90TraitsOf = AttentionFwdSm90Traits<Element, kFwdSm90Tiles[kTile].head_dim, kFwdSm90Tiles[kTile].groups,
                                               kFwdSm90Tiles[kTile].block_k_of(kSequences),
                                               kFwdSm90Tiles[kTile].kind_of(kSequences), kSequences>;

template <typename Traits>
const char* make_fwd_maps(AttentionFwdMaps& maps, const AttentionFwdArgs& args) {
  using Element = typename Traits::Element;
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  // Packed sequences are one batch entry of the tensors.
  const int64_t batch = Traits::kPacked ? 1 : args.batch;
  const int64_t seqlen_q = Traits::kPacked ? args.packed.q.total : args.scores.seqlen_q;
  // A cache has entries of its own.
  const int64_t batch_k = Traits::kCached ? args.cache.entries : batch;
  const int64_t seqlen_k = Traits::kCached   ? args.cache.block_size
                           : Traits::kPacked ? args.packed.k.total
                                             : args.scores.seqlen_k;
  maps.key_box_rows = Traits::kCached ? cached_box_rows(args.cache, Traits::kBlockK) : Traits::kBlockK;
  const char* errors[] = {
      make_packed_rows_map<TileQ, Element>(maps.q, args.q, batch, args.heads, args.group, seqlen_q, args.head_dim, 64),
      make_rows_map<TileK, Element>(maps.k, args.k, batch_k, args.heads_kv, seqlen_k, args.head_dim, maps.key_box_rows),
      make_rows_map<TileK, Element>(maps.v, args.v, batch_k, args.heads_kv, seqlen_k, args.head_dim_v,
                                    maps.key_box_rows),
      make_packed_rows_map<TileQ, Element>(maps.out, args.out, batch, args.heads, args.group, seqlen_q, args.head_dim_v,
                                           16),
  };
  for (const char* error : errors) {
    if (error != nullptr) return error;
  }
  if constexpr (Traits::kHasMask) {
    const char* error = make_mask_stages(maps.mask, args.scores, args.batch, args.heads, Traits::kBlockK,
                                         Traits::kGroups, Traits::kOptionalBytes);
    const int mask_bytes = maps.mask.count * Traits::kGroups * maps.mask.stage_bytes;
    maps.out_fits = mask_bytes + Traits::kOutBytes <= Traits::kOptionalBytes;
    return error;
  }
  return nullptr;
}

template <typename Traits>
const char* launch_fwd_sm90(const AttentionFwdArgs& args, int multiprocessors, cudaStream_t stream) {
  constexpr size_t kSmemBytes = sizeof(AttentionFwdSm90Smem<Traits>);
  static_assert(kSmemBytes <= 227 * 1024, "what a block of compute capability 9.0 can have");
  AttentionFwdMaps maps;
  if (const char* error = make_fwd_maps<Traits>(maps, args)) return error;
  const int64_t row_tiles = int64_t{args.batch} * args.order.tile_heads * args.order.row_tiles;
  if (row_tiles > INT32_MAX - 2 * multiprocessors) return "there are more than 2^31 row tiles";
  const auto blocks = static_cast<unsigned>(row_tiles < multiprocessors ? row_tiles : multiprocessors);
  return launch_kernel(attention_fwd_sm90_kernel<Traits>, blocks, Traits::kThreads, kSmemBytes, stream, args, maps,
                       static_cast<int>(row_tiles));
}

// Starts the kernel of kFwdSm90Tiles[kTile] for what the batch entries are.
template <typename Element, int kTile>
const char* launch_fwd_sm90_sequences(const AttentionFwdArgs& args, int multiprocessors, cudaStream_t stream) {
  if constexpr (kFwdSm90Tiles[kTile].has(Sequences::kCached)) {
    using Cached = FwdSm90TraitsOf<Element, kTile, Sequences::kCached>;
    if (is_cached(args.cache)) return launch_fwd_sm90<Cached>(args, multiprocessors, stream);
  }
  if constexpr (kFwdSm90Tiles[kTile].has(Sequences::kPacked)) {
    using Packed = FwdSm90TraitsOf<Element, kTile, Sequences::kPacked>;
    if (is_packed(args.packed)) return launch_fwd_sm90<Packed>(args, multiprocessors, stream);
  }
  using Dense = FwdSm90TraitsOf<Element, kTile, Sequences::kDense>;
  return launch_fwd_sm90<Dense>(args, multiprocessors, stream);
}

// Starts the kernel of kFwdSm90Tiles[tile], which has this head_dim.
template <typename Element, int kHeadDim, int kTile = 0>
const char* launch_fwd_sm90_tile(int tile, const AttentionFwdArgs& args, int multiprocessors, cudaStream_t stream) {
  if constexpr (kTile == kFwdSm90TileCount) {
    return "there is no kernel for this tile";
  } else {
    if constexpr (kFwdSm90Tiles[kTile].head_dim == kHeadDim) {
      if (tile == kTile) return launch_fwd_sm90_sequences<Element, kTile>(args, multiprocessors, stream);
    }
    return launch_fwd_sm90_tile<Element, kHeadDim, kTile + 1>(tile, args, multiprocessors, stream);
  }
}

}  // namespace fastattn
