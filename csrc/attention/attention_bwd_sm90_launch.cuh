// Starts the attention backward of Hopper: which calls it serves, its tiles, and for each element type and head_dim one
// unit (attention_bwd_cuda_sm90_*.cu) that instantiates its kernels.
#pragma once

#include "attention/attention_bwd_dq_sum_sm90.cuh"
#include "attention/attention_bwd_sm90.cuh"
#include "attention/attention_bwd_wide_sm90.cuh"
#include "common/device.h"
#include "common/launch.cuh"

namespace fastattn {

// Of attention_bwd_sm90_kernel, or of attention_bwd_wide_sm90_kernel from 192 on: the head_dim, into which the call's
// two fit, and the tile.
struct BwdSm90Tile {
  int head_dim = 0;  // 0: the kernels of sm_80 serve the call
  ScoreKind kind = ScoreKind::kPlain;
  bool sums_rows = false;  // of dS, which correct delta for float32 gradients

  int block_q() const { return head_dim == 64 && kind == ScoreKind::kPlain && !sums_rows ? 128 : 64; }
  int block_k() const { return head_dim > 128 ? 64 : 128; }
};

// The tensors as TMA sees them: of packed sequences all at once.
struct BwdSm90Extent {
  int64_t batch, seqlen_q, seqlen_k;
};
inline BwdSm90Extent extent_sm90(const PackedSequences& packed, int64_t batch, int64_t seqlen_q, int64_t seqlen_k) {
  return is_packed(packed) ? BwdSm90Extent{1, packed.q.total, packed.k.total}
                           : BwdSm90Extent{batch, seqlen_q, seqlen_k};
}

// Hopper serves tensors that TMA can address; expanded operands, whose rows coincide, are not among them. What its
// kernels keep of a capped score is the factor of dX, of which the rows have no known sum, and not dS.
inline BwdSm90Tile choose_bwd_sm90_tile(const AttentionBwdParams& p, const DeviceLaunch& launch, bool sums_rows) {
  const int64_t head_dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const BwdSm90Extent extent = extent_sm90(packed_sequences(p), p.batch, p.seqlen_q, p.seqlen_k);
  constexpr int64_t kMostRows = INT32_MAX - 256;  // positions of boxes that reach past the end are 32-bit numbers
  const bool served = launch.compute_capability == 90 && head_dim <= 256 && extent.seqlen_q <= kMostRows &&
                      extent.seqlen_k <= kMostRows && !(sums_rows && p.softcap != 0.0) &&
                      tma_can_address(p.q, extent.batch, p.heads, extent.seqlen_q, p.head_dim) &&
                      tma_can_address(p.k, extent.batch, p.heads_kv, extent.seqlen_k, p.head_dim) &&
                      tma_can_address(p.v, extent.batch, p.heads_kv, extent.seqlen_k, p.head_dim_v) &&
                      tma_can_address(p.dout, extent.batch, p.heads, extent.seqlen_q, p.head_dim_v);
  if (!served) return {};
  return {head_dim <= 64    ? 64
          : head_dim <= 96  ? 96
          : head_dim <= 128 ? 128
          : head_dim <= 192 ? 192
                            : 256,
          score_kind(p), sums_rows};
}

template <typename Traits, bool kWide = (Traits::kHeadDim > 128)>
struct BwdSm90KernelOf {
  using Smem = AttentionBwdSm90Smem<Traits>;
  static constexpr auto kKernel = attention_bwd_sm90_kernel<Traits>;
};
template <typename Traits>
struct BwdSm90KernelOf<Traits, true> {
  using Smem = AttentionBwdWideSm90Smem<Traits>;
  static constexpr auto kKernel = attention_bwd_wide_sm90_kernel<Traits>;
};

template <typename Traits>
const char* launch_bwd_sm90_kernel(const AttentionBwdSm90Args& args, int64_t entries, unsigned blocks,
                                   cudaStream_t stream) {
  using Element = typename Traits::Element;
  using TileQ = typename Traits::TileQ;
  using Smem = typename BwdSm90KernelOf<Traits>::Smem;
  constexpr size_t kSmemBytes = sizeof(Smem);
  static_assert(kSmemBytes <= 227 * 1024, "what a block of compute capability 9.0 can have");
  const AttentionBwdArgs& bwd = args.bwd;
  const int64_t heads = bwd.heads, heads_kv = bwd.heads_kv;
  const auto [batch, seqlen_q, seqlen_k] = extent_sm90(bwd.packed, entries, bwd.scores.seqlen_q, bwd.scores.seqlen_k);
  TensorMap q_map, k_map, v_map, dout_map;
  const char* error =
      make_rows_map<TileQ, Element>(q_map, bwd.q, batch, heads, seqlen_q, bwd.head_dim, Traits::kBlockQ);
  if (error == nullptr) {
    error = make_rows_map<typename Traits::TileK, Element>(k_map, bwd.k, batch, heads_kv, seqlen_k, bwd.head_dim,
                                                           Traits::kBlockK);
  }
  if (error == nullptr) {
    error = make_rows_map<typename Traits::TileV, Element>(v_map, bwd.v, batch, heads_kv, seqlen_k, bwd.head_dim_v,
                                                           Traits::kBlockK);
  }
  if (error == nullptr) {
    error = make_rows_map<TileQ, Element>(dout_map, bwd.dout, batch, heads, seqlen_q, bwd.head_dim_v, Traits::kBlockQ);
  }
  MaskStages mask;
  if (error == nullptr && Traits::kHasMask) {
    error = make_mask_stages(mask, bwd.scores, static_cast<int>(batch), bwd.heads, Traits::kBlockK, 1,
                             static_cast<int>(sizeof(Smem::mask)));
  }
  if (error != nullptr) return error;
  return launch_kernel(BwdSm90KernelOf<Traits>::kKernel, blocks, Traits::kThreads, kSmemBytes, stream, args, q_map,
                       k_map, v_map, dout_map, mask);
}

template <typename Element, int kHeadDim, ScoreKind kKind, bool kPacked, bool kSumsRows>
using BwdSm90TraitsOf =
    std::conditional_t<(kHeadDim > 128), AttentionBwdWideSm90Traits<Element, kHeadDim, kKind, kPacked, kSumsRows>,
                       AttentionBwdSm90Traits<Element, kHeadDim, kKind, kPacked, kSumsRows>>;

// Starts the kernel of the tile, which has this head_dim, for args made for it. Packed sequences have no mask.
template <typename Element, int kHeadDim>
const char* launch_bwd_sm90(const BwdSm90Tile& tile, const AttentionBwdSm90Args& args, int64_t batch, unsigned blocks,
                            cudaStream_t stream) {
  const ScoreKind kind = tile.kind;
  const auto launch = [&](auto kind_of, auto packed) {
    using Plain = BwdSm90TraitsOf<Element, kHeadDim, kind_of(), packed(), false>;
    using Sums = BwdSm90TraitsOf<Element, kHeadDim, kind_of(), packed(), true>;
    return tile.sums_rows ? launch_bwd_sm90_kernel<Sums>(args, batch, blocks, stream)
                          : launch_bwd_sm90_kernel<Plain>(args, batch, blocks, stream);
  };
  constexpr std::integral_constant<ScoreKind, ScoreKind::kPlain> kPlain;
  constexpr std::integral_constant<ScoreKind, ScoreKind::kMask> kMask;
  constexpr std::integral_constant<ScoreKind, ScoreKind::kEverything> kEverything;
  if (is_packed(args.bwd.packed)) {
    return kind == ScoreKind::kPlain ? launch(kPlain, std::true_type{}) : launch(kEverything, std::true_type{});
  }
  return kind == ScoreKind::kPlain  ? launch(kPlain, std::false_type{})
         : kind == ScoreKind::kMask ? launch(kMask, std::false_type{})
                                    : launch(kEverything, std::false_type{});
}

#define FASTATTN_BWD_SM90_UNIT(declaration, Element, kHeadDim)                                                         \
  declaration template const char* launch_bwd_sm90<Element, kHeadDim>(const BwdSm90Tile&, const AttentionBwdSm90Args&, \
                                                                      int64_t, unsigned, cudaStream_t);

}  // namespace fastattn
