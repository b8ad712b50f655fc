// The Hopper forward's tiles: how large they are, what a thread has of registers, what lies where in shared memory, and
// the tensor maps that fill and empty it. The table of tiles is in attention_fwd_sm90_launch.cuh.
#pragma once

#include "attention/attention_cached_sm90.cuh"
#include "attention/attention_fwd_sm80.cuh"
#include "attention/attention_mask_stage_sm90.cuh"
#include "attention/attention_packed_sm90.cuh"
#include "attention/attention_tile_sm90.cuh"

namespace fastattn {

// Whether heads may be packed into the rows of a tile: not where its few registers would make ptxas spill.
constexpr bool fwd_sm90_packs_heads(int head_dim, ScoreKind kind) {
  return kind == ScoreKind::kPlain || (head_dim < 256 && !(kind == ScoreKind::kEverything && head_dim == 128));
}

// What a batch entry is: part of tensors of one length, one of packed sequences, or a sequence in a key/value cache.
enum class Sequences { kDense, kPacked, kCached };

template <typename Element_, int kHeadDim_, int kGroups_, int kBlockK_, ScoreKind kKind_, Sequences kSequences_>
struct AttentionFwdSm90Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kGroups = kGroups_, kBlockK = kBlockK_, kStages = 2;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kPacked = kSequences_ == Sequences::kPacked, kCached = kSequences_ == Sequences::kCached;
  static constexpr bool kOwnLengths = kPacked || kCached;  // of each batch entry, which then has no mask
  static constexpr int kThreads = 128 * (1 + kGroups), kBlockQ = 64 * kGroups;
  // Rows from `first` on of a head or of packed heads.
  FASTATTN_DEVICE static QueryRows query_rows(const AttentionFwdArgs& args, int first, int tile_head) {
    if constexpr (!fwd_sm90_packs_heads(kHeadDim, kKind)) return {first, tile_head};
    return {first, tile_head * args.group, args.group, args.group_inverse | 1};  // known not to be 0
  }
  using TileQ = TileSm90<64, kHeadDim>;  // of one warpgroup, as is the output's
  using TileK = TileSm90<kBlockK, kHeadDim>;

  static constexpr int kMinSmemBytes = kGroups * TileQ::kBytes + 2 * kStages * TileK::kBytes;
  static constexpr int kSpareBytes = 224 * 1024 - kMinSmemBytes, kOutBytes = kGroups * TileQ::kBytes;
  // Tiles of the mask come first, of which fp32 takes most. With a tile of its own, out need not have left when the
  // next q arrives.
  static constexpr bool kHasMask = kKind != ScoreKind::kPlain && !kOwnLengths, kOutFits = kOutBytes <= kSpareBytes;
  static constexpr int kMostMaskBytes = kMaxMaskStages * kGroups * mask_stage_bytes(kBlockK, 4);
  static constexpr int kOptionalBytes =
      !kHasMask ? kOutFits * kOutBytes
                : (kMostMaskBytes + kOutBytes < kSpareBytes ? kMostMaskBytes + kOutBytes : kSpareBytes) / 1024 * 1024;
  // What the producers give up of the launch's registers, the others get. They need more for masks; where a thread
  // holds 128 registers of the output they do with less.
  static constexpr bool kFeedsMasks = kHasMask && kHeadDim < 256;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : kFeedsMasks ? 56 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : kFeedsMasks ? 224 : 232;
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (kGroups == 2 ? 3 * 168 : 4 * 128),
                "setmaxnreg shares out what the launch gave");

  static_assert(kGroups == 2 || (kGroups == 3 && !kHasMask), "the warpgroups' shares of the registers");
  static_assert(kBlockK % 16 == 0 && kBlockK <= 256, "wgmma's columns");
  static_assert(kBlockK % 32 == 0 || kKind != ScoreKind::kEverything, "a draw of dropout serves 32 columns");
};

template <typename Traits>
struct AttentionFwdSm90Smem {
  static constexpr int kStages = Traits::kStages, kGroups = Traits::kGroups;
  static constexpr int kQBytes = Traits::TileQ::kBytes, kKBytes = Traits::TileK::kBytes;
  alignas(1024) uint8_t q[kGroups][kQBytes];
  alignas(1024) uint8_t k[kStages][kKBytes];
  alignas(1024) uint8_t v[kStages][kKBytes];
  alignas(1024) uint8_t optional[Traits::kOptionalBytes > 0 ? Traits::kOptionalBytes : 16];  // masks, ..., out
  uint64_t q_full[kGroups], q_empty[kGroups];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t mask_full[kMaxMaskStages][kGroups], mask_empty[kMaxMaskStages][kGroups];
  uint64_t v_arrived[kStages];  // with rows behind a sequence's last key; it is full when they are cleared
  PackedEntry entries[Traits::kOwnLengths ? Traits::kThreads / 32 : 1];
  PlaceRing<Traits::kPacked> places;

  FASTATTN_DEVICE uint8_t* out(int group, bool has_tile) {
    return has_tile ? optional + Traits::kOptionalBytes - Traits::kOutBytes + group * kQBytes : q[group];
  }
  FASTATTN_DEVICE uint8_t* mask(const MaskStages& mask, int stage, int group) {
    return optional + (stage * kGroups + group) * mask.stage_bytes;
  }
};

// How tiles come and go.
struct AttentionFwdMaps {
  TensorMap q, k, v, out;  // boxes of 64 packed rows, of kBlockK rows twice, and of a warp's 16 packed rows
  MaskStages mask;
  bool out_fits = false;  // next to the mask's stages
  int key_box_rows = 0;   // of k and v, where they are cached

  template <typename Traits>
  FASTATTN_DEVICE bool out_has_tile() const {
    return Traits::kHasMask ? out_fits : Traits::kOutFits;
  }
};

}  // namespace fastattn
