// Attention backward on Hopper for head_dim up to 128: dq, dk and dv in one kernel. Above, registers and shared memory
// ask for another division of the work: attention_bwd_wide_sm90.cuh.
// Work:    a block owns 128 keys of a key head and visits the visible query tiles of every query head of the group. One
//          warp feeds it by TMA; two warpgroups have 64 keys each; two more warps add what the block knows of dq to
//          global memory. attention_sm90.md draws the timeline.
//            S^T = k q^T, dP^T = v dO^T      keys are the rows of both accumulators, so that
//            dv += P^T dO, dk += dX^T q      take P^T and dX^T from registers, as they are;
//            dq  = dX k                      takes dX of both warpgroups from shared memory, each one half of dq.
// Memory:  k and v stay; q with lse, dO with delta arrive in two stages. dX^T is stored as it lies in registers, a row
//          a key: read with the queries as its rows, it needs no transposition. dq leaves in fp32, 16 KiB a warpgroup,
//          by a bulk copy that adds: in any order, or in the order of the keys where every run must give the same.
// Order:   tiles and shared memory; who adds up dq; the multiplying warpgroups, whose loop is the timeline; the kernel.
//          The feeding warp is in attention_bwd_stages_sm90.cuh, S to P and dP to dX are in
//          attention_bwd_probabilities_sm90.cuh, dq's fp32 sums in attention_bwd_dq_sum_sm90.cuh.
// Packed:  sequences one behind the other have tiles of their own; attention_bwd_packed_sm90.cuh.
// Numbers: fp16/bf16 inputs, fp32 scores, P, dX and sums; P and dX are rounded for the products with dO, q and k.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2; Shah et al., "FlashAttention-3", arXiv:2407.08608.
#pragma once

#include "attention/attention_bwd_packed_sm90.cuh"
#include "attention/attention_bwd_probabilities_sm90.cuh"
#include "attention/attention_bwd_stages_sm90.cuh"

namespace fastattn {

template <typename Element_, int kHeadDim_, ScoreKind kKind_, bool kPacked_, bool kSumsRows_>
struct AttentionBwdSm90Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kPacked = kPacked_;      // sequences, which have no mask
  static constexpr bool kSumsRows = kSumsRows_;  // of dS, for float32 gradients
  static constexpr bool kHasMask = kKind != ScoreKind::kPlain && !kPacked, kNoMask = !kHasMask;
  // Of 240 registers two gradients take 64, 96 or 128, S and dP 128 or 64, P and dX, rounded, half as much.
  static constexpr int kBlockK = 128;
  static constexpr int kBlockQ = kHeadDim == 64 && kKind == ScoreKind::kPlain && !kSumsRows ? 128 : 64;
  static constexpr int kGroups = 2, kGroupKeys = 64, kStages = 2, kDoutStages = 2;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kColTiles = kBlockQ / 8;
  // What runs under what depends on the registers that are left. dP while P is made: not where P takes many. dv is
  // started with P, else with dX; then P is rounded as late as dX is, and takes none while S and dP do.
  static constexpr bool kFewLeft = kHeadDim == 128 && kKind != ScoreKind::kPlain;
  static constexpr bool kEarlyDp = kKind != ScoreKind::kEverything;
  static constexpr bool kEarlyDv = kBlockQ == 64 && !(kFewLeft && kKind == ScoreKind::kMask);
  // Whether tiles of attn_mask come ahead; with everything at head_dim 128 there are no registers for it.
  static constexpr bool kCopiesMasks =
      kHasMask && (kKind == ScoreKind::kMask || (kKind == ScoreKind::kEverything && !kFewLeft));
  // Whether dv runs while dX is made; else it is done before dP begins, and P's registers are dP's.
  static constexpr bool kOverlapsDv = kEarlyDv && !kFewLeft;

  // Each warpgroup's part of dq: 64 rows of all columns, or all rows of some columns, of which the second may have
  // less.
  static constexpr bool kSplitsRows = kBlockQ == 128;
  static constexpr int kDqCols = kSplitsRows || kHeadDim > 64 ? 64 : 32;
  static constexpr int kLastDqCols = kSplitsRows ? kDqCols : kHeadDim - kDqCols;
  // At head_dim 96 the second computes 64 as well, of which 32 are of what follows k in shared memory, the first panel
  // of v, and are dropped: both warpgroups must run the same instructions, or ptxas waits after each product.
  FASTATTN_DEVICE static int dq_column(int group) { return kSplitsRows ? 0 : group * kDqCols; }
  FASTATTN_DEVICE static int dq_row(int group) { return kSplitsRows ? group * DqSum::kRows : 0; }

  // A part's columns start with a panel of k.
  using TileK = TileSm90<kBlockK, kHeadDim, kDqCols == 64 && kHeadDim % 64 == 0 ? 64 : 32>;
  using TileV = TileSm90<kBlockK, kHeadDim>;
  using TileQ = TileSm90<kBlockQ, kHeadDim>;  // and of dO
  using TileDx = TileSm90<kBlockK, kBlockQ>;
  using Scores = float[1][kColTiles][4];
  using Operand = uint32_t[kColTiles / 2][4];
  using Gradient = float[1][kHeadDim / 8][4];
  using DqPiece = float[1][kDqCols / 8][4];

  // 65536 registers for three warpgroups: what the first gives up, the others get. It needs more where it looks for
  // visible tiles of a mask.
  static constexpr int kFeedingRegisters = !kHasMask ? 24 : kFewLeft ? 40 : 56;
  static constexpr int kMultiplyingRegisters = (512 - kFeedingRegisters) / 2 / 8 * 8;
  static_assert(kFeedingRegisters + kGroups * kMultiplyingRegisters <= 3 * 168, "what the launch gave");
};

template <typename Traits>
struct AttentionBwdSm90Smem {
  alignas(1024) uint8_t k[Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::TileV::kBytes];
  alignas(1024) uint8_t q[Traits::kStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dout[Traits::kStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dx[Traits::kStages][Traits::TileDx::kBytes];
  alignas(1024) float dq[Traits::kGroups][DqSum::kRows * Traits::kDqCols];
  // Of the kernels with masks.
  static constexpr int kOtherBytes = Traits::TileK::kBytes + Traits::TileV::kBytes +
                                     Traits::kStages * (2 * Traits::TileQ::kBytes + Traits::TileDx::kBytes) +
                                     Traits::kGroups * DqSum::kRows * Traits::kDqCols * 4;
  alignas(1024) uint8_t mask[bwd_mask_bytes<kOtherBytes, Traits::kBlockK, Traits::kCopiesMasks>()];
  alignas(16) float lse[Traits::kStages][Traits::kBlockQ];
  alignas(16) float delta[Traits::kStages][Traits::kBlockQ];
  BwdStageInfo info[Traits::kStages], dq_info[Traits::kGroups];
  uint64_t k_full, v_full;
  uint64_t q_full[Traits::kStages], q_empty[Traits::kStages];        // and lse
  uint64_t dout_full[Traits::kStages], dout_empty[Traits::kStages];  // and delta
  uint64_t mask_full[kMaxMaskStages], mask_empty[kMaxMaskStages];
  uint64_t dq_full[Traits::kGroups], dq_empty[Traits::kGroups];
  BwdPackedSmem<Traits> packed;
  alignas(16) float row_sums[Traits::kGroups][Traits::kSumsRows ? 2 * Traits::kBlockQ : 4];  // of two pairs of warps

  // Calls fn(barrier, arrivals) for each mbarrier that is used.
  template <typename Fn>
  FASTATTN_DEVICE void for_each_barrier(Fn fn) {
    constexpr int kWarps = 4 * Traits::kGroups;
    fn(&k_full, 1);
    fn(&v_full, 1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      fn(&q_full[stage], 1);
      fn(&q_empty[stage], kWarps);
      fn(&dout_full[stage], 1);
      fn(&dout_empty[stage], kWarps);
    }
    for (int stage = 0; Traits::kCopiesMasks && stage < kMaxMaskStages; ++stage) {
      fn(&mask_full[stage], 1);
      fn(&mask_empty[stage], kWarps);
    }
    for (int group = 0; group < Traits::kGroups; ++group) {
      fn(&dq_full[group], 4);
      fn(&dq_empty[group], 1);
    }
    for_each_packed_barrier<Traits>(packed, fn);
  }
};

// ---- the storing warps, one for each warpgroup

// By one thread: adds the warpgroup's parts of dq to global memory as they come.
template <typename Traits>
FASTATTN_DEVICE void add_dq_pieces(AttentionBwdSm90Smem<Traits>& smem, const AttentionBwdSm90Args& args, int group_) {
  BwdBlockKeys<Traits> keys = keys_of_block<Traits>(smem, args.bwd);
  const bool takes_turns = args.dq.turns != nullptr;
  for (uint32_t step = 0;; ++step) {
    // Addresses made of it take registers.
    const int group = Traits::kPacked || Traits::kSumsRows ? opaque(group_) : group_;
    const uint32_t bytes = DqSum::kRows * 4 * (group == 0 ? Traits::kDqCols : Traits::kLastDqCols);
    mbarrier_wait(&smem.dq_full[group], step & 1);
    const BwdStageInfo info = smem.dq_info[group];
    if (info.head < 0) break;
    const int row = info.query_tile * Traits::kBlockQ + Traits::dq_row(group);
    const int64_t row_tile = args.dq.row_tile(statistics_head<Traits>(args.bwd, keys.batch, info.head), row);
    if (takes_turns) wait_for_turn(args.dq.turn(row_tile, group), turn_of_block<Traits>(args.bwd, keys, info));
    bulk_reduce_add(args.dq.piece(row_tile, Traits::dq_column(group)), smem.dq[group], bytes);
    if constexpr (Traits::kSumsRows) {
      bulk_reduce_add(args.dq.row_sums(row_tile, 2 * group), smem.row_sums[group], sizeof smem.row_sums[group]);
    }
    bulk_commit_group();
    bulk_wait_group_read<0>();
    mbarrier_arrive(&smem.dq_empty[group]);
    if (takes_turns) {
      bulk_wait_group<0>();
      pass_turn(args.dq.turn(row_tile, group));
    }
  }
}

// ---- the multiplying warpgroups

constexpr int kBothGroupsBarrier = 1;

// Everything a multiplying warpgroup keeps from step to step.
template <typename Traits>
struct BwdGroup {
  using Element = typename Traits::Element;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileQ = typename Traits::TileQ;
  using TileDx = typename Traits::TileDx;

  AttentionBwdSm90Smem<Traits>& smem;
  const AttentionBwdArgs &args, &own;  // every block's, and those of its sequence
  BwdBlockKeys<Traits> keys;
  const int group, first_key, warp_row, lane;  // first_key and warp_row count from the block's first key
  DropoutState dropout;

  FASTATTN_DEVICE BwdGroup(AttentionBwdSm90Smem<Traits>& smem_, const AttentionBwdArgs& args_,
                           const AttentionBwdArgs& own_, int group_)
      : smem(smem_),
        args(args_),
        own(own_),
        keys(keys_of_block<Traits>(smem_, own_)),
        group(group_),
        first_key(group_ * Traits::kGroupKeys),
        warp_row(first_key + thread_of_tile<Traits>() / 32 % 4 * 16),
        lane(thread_of_tile<Traits>() % 32) {
    if constexpr (Traits::kKind == ScoreKind::kEverything) dropout = load_dropout_state(args.scores);
  }

  FASTATTN_DEVICE TileK k_tile() const { return {smem_address(smem.k)}; }
  FASTATTN_DEVICE TileV v_tile() const { return {smem_address(smem.v)}; }
  FASTATTN_DEVICE TileQ q_tile(int stage) const { return {smem_address(smem.q[stage])}; }
  FASTATTN_DEVICE TileQ dout_tile(int stage) const { return {smem_address(smem.dout[stage])}; }
  FASTATTN_DEVICE void arrive_by_warp(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // dX to shared memory, where both warpgroups' next product reads it once they have met.
  FASTATTN_DEVICE void publish(const typename Traits::Operand& dx, TileDx tile) {
    const int at = Traits::kPacked && Traits::kBlockQ == 128 ? opaque(lane) : lane;  // too many addresses to keep
#pragma unroll
    for (int n = 0; n < Traits::kColTiles / 2; ++n) {
      stmatrix(tile.chunk_address(warp_row + at % 16, 16 * n + at / 16 * 8), dx[n]);
    }
    fence_proxy_async();
  }
  FASTATTN_DEVICE void meet() const { bar_sync(kBothGroupsBarrier, 128 * Traits::kGroups); }

  // Row sums leave with the step's dq. Of each pair of warps, one writes its sums before both meet, the other adds its
  // own afterwards.
  FASTATTN_DEVICE static bool is_odd_warp(int thread) { return thread / 32 % 2 != 0; }
  FASTATTN_DEVICE float2* row_sums_place(int thread) const {
    const int pair = thread / 64 % 2;
    return reinterpret_cast<float2*>(smem.row_sums[thread / 128 - 1]) + 32 * pair + thread % 32;
  }
  FASTATTN_DEVICE void write_row_sums(float2 own_sums, uint32_t step) {
    if constexpr (Traits::kSumsRows) {
      const int thread = opaque(static_cast<int>(threadIdx.x));
      if (!is_odd_warp(thread)) return;
      mbarrier_wait(&smem.dq_empty[group], (step & 1) ^ 1);  // those of the step before have left
      *row_sums_place(thread) = own_sums;
    }
  }
  FASTATTN_DEVICE void complete_row_sums(float2 own_sums) {
    if constexpr (Traits::kSumsRows) {
      const int thread = opaque(static_cast<int>(threadIdx.x));
      if (is_odd_warp(thread)) return;
      const float2 others = *row_sums_place(thread);
      *row_sums_place(thread) = make_float2(own_sums.x + others.x, own_sums.y + others.y);
    }
  }

  // Hands a part of dq to the storing warp.
  FASTATTN_DEVICE void hand_over_dq(const typename Traits::DqPiece& dq, BwdStageInfo info, uint32_t step) {
    mbarrier_wait(&smem.dq_empty[group], (step & 1) ^ 1);
    const int thread = static_cast<int>(threadIdx.x) % 128;
    if (thread == 0) smem.dq_info[group] = info;
    auto* piece = reinterpret_cast<float4*>(smem.dq[group]) + thread;
#pragma unroll
    for (int n = 0; n < Traits::kDqCols / 8; ++n) {
      piece[128 * n] = make_float4(dq[0][n][0], dq[0][n][1], dq[0][n][2], dq[0][n][3]);
    }
    fence_proxy_async();
    arrive_by_warp(&smem.dq_full[group]);
  }

  FASTATTN_DEVICE void store_gradients(const typename Traits::Gradient& dk, const typename Traits::Gradient& dv) {
    if (args.parts.count() > 1) {
      store_shared_sums<Traits>(dv, args.scores.dropout_scale, smem, own, args.scores.seqlen_k, /*of_dv=*/true,
                                warp_row);
      store_shared_sums<Traits>(dk, args.scale, smem, own, args.scores.seqlen_k, /*of_dv=*/false, warp_row);
      return;
    }
    const int rows = keys.count - warp_row, key = keys.first + warp_row;
    const auto output = [&](const AttentionTensor& tensor, int cols, bool is_aligned) {
      return TileOutput<Element>{head_gmem<Element>(tensor, keys.batch, keys.head_kv) + key * tensor.stride_row,
                                 tensor.stride_row, rows, cols, is_aligned};
    };
    meet();  // neither reads k any more, nor v, which at head_dim 96 lends k columns
    store_accumulators<Element>(dv, args.scores.dropout_scale, v_tile(), smem.v, warp_row,
                                output(own.dv, args.head_dim_v, args.dv_is_aligned));
    store_accumulators<Element>(dk, args.scale, k_tile(), smem.k, warp_row,
                                output(own.dk, args.head_dim, args.dk_is_aligned));
  }
};

// The end of a step: dq = dX k, which the storing warp takes over, and dk += dX^T q.
template <typename Traits>
FASTATTN_DEVICE void make_dq_and_dk(BwdGroup<Traits>& group, typename Traits::Gradient& dk,
                                    typename Traits::Gradient& dv, const typename Traits::Operand& dx,
                                    BwdStageInfo info, RingPosition<Traits::kStages> at) {
  using Element = typename Traits::Element;
  AttentionBwdSm90Smem<Traits>& smem = group.smem;
  const int stage = at.stage();
  const typename Traits::TileDx dx_tile{smem_address(smem.dx[stage])};
  typename Traits::DqPiece dq;
  wgmma_fence();
  issue_dq<Element>(dq, dx_tile, Traits::dq_row(group.group), group.k_tile(), Traits::dq_column(group.group));
  wgmma_commit_group();
  wgmma_fence();
  issue_ab<Element>(dk, dx, group.q_tile(stage));
  wgmma_commit_group();
  wgmma_wait_group<2>();  // dq, dk
  group.arrive_by_warp(&smem.dout_empty[stage]);
  wgmma_wait_group<1>();  // dk
  pin_accumulators(wgmma_registers(dq));
  group.hand_over_dq(dq, info, at.count);
  wgmma_wait_group<0>();
  pin_accumulators(wgmma_registers(dk));
  pin_accumulators(wgmma_registers(dv));
  group.arrive_by_warp(&smem.q_empty[stage]);
}

template <typename Traits>
FASTATTN_DEVICE void multiply_bwd_tiles(AttentionBwdSm90Smem<Traits>& smem, const AttentionBwdArgs& args,
                                        const AttentionBwdArgs& own, const MaskStages& mask, int group_) {
  using Element = typename Traits::Element;
  BwdGroup<Traits> group(smem, args, own, group_);
  typename Traits::Gradient dk = {}, dv = {};
  RingPosition<Traits::kStages> at;
  mbarrier_wait(&smem.k_full, 0);
  mbarrier_wait(&smem.v_full, 0);

  // What is in flight after a wait stands behind it, oldest first. All is done at the end of a step: accumulators that
  // a loop carries in flight make ptxas wait after every product.
  for (;; ++at.count) {
    const int stage = at.stage();
    mbarrier_wait(&smem.q_full[stage], at.parity());
    const BwdStageInfo info = smem.info[stage];
    if (info.head < 0) break;
    typename Traits::Scores s, dp;
    typename Traits::Operand p, dx;
    const auto issue_dp = [&] {
      mbarrier_wait(&smem.dout_full[stage], at.parity());
      wgmma_fence();
      issue_abt<Element>(dp, group.v_tile(), group.first_key, group.dout_tile(stage));
      wgmma_commit_group();
    };
    const auto issue_dv = [&] {
      if constexpr (!Traits::kEarlyDp) mbarrier_wait(&smem.dout_full[stage], at.parity());
      wgmma_fence();
      issue_ab<Element>(dv, p, group.dout_tile(stage));
      wgmma_commit_group();
    };

    wgmma_fence();
    issue_abt<Element>(s, group.k_tile(), group.first_key, group.q_tile(stage));
    wgmma_commit_group();
    if constexpr (Traits::kEarlyDp) issue_dp();
    wgmma_wait_group<Traits::kEarlyDp ? 1 : 0>();  // dp
    pin_accumulators(wgmma_registers(s));
    make_step_probabilities<Traits>(s, p, smem, tile_scores<Traits>(args.scores, own.scores), mask, group.dropout,
                                    group.keys, info, group.warp_row + group.lane / 4, smem.lse[stage]);
    if constexpr (Traits::kEarlyDv) issue_dv();
    if constexpr (Traits::kEarlyDv && !Traits::kOverlapsDv) wgmma_wait_group<0>();
    if constexpr (!Traits::kEarlyDp) issue_dp();
    wgmma_wait_group<Traits::kEarlyDp && Traits::kOverlapsDv ? 1 : 0>();  // dv
    pin_accumulators(wgmma_registers(dp));
    [[maybe_unused]] float2 row_sums;
    make_score_gradients<Traits>(dx, p, dp, s, args.scores, smem.delta[stage], row_sums);
    group.write_row_sums(row_sums, at.count);
    group.publish(dx, typename Traits::TileDx{smem_address(smem.dx[stage])});
    if constexpr (!Traits::kEarlyDv) issue_dv();
    group.meet();  // both have also read dX of the step before the last, whose place this one took
    group.complete_row_sums(row_sums);
    make_dq_and_dk(group, dk, dv, dx, info, at);
  }
  group.hand_over_dq({}, {}, at.count);
  group.store_gradients(dk, dv);
}

// ---- the kernel

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ AttentionBwdSm90Args args,
                              const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                              const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                              const __grid_constant__ MaskStages mask) {
  FASTATTN_DYNAMIC_SMEM(bytes);
  auto& smem = *reinterpret_cast<AttentionBwdSm90Smem<Traits>*>(bytes);
  const AttentionBwdSm90Args& own = args_of_block<Traits>(smem, args);
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map, &dout_map}) prefetch_tensor_map(map);
    if (!Traits::kPacked) init_bwd_barriers(smem);
  }
  if (!Traits::kPacked) __syncthreads();
  // Where few registers are left, ptxas spills some if it knows that this is uniform.
  const int warp = Traits::kFewLeft ? static_cast<int>(threadIdx.x) / 32 : warp_of_block();
  if (warp < 4) {
    setmaxnreg_dec<Traits::kFeedingRegisters>();
    for_each_key_tile<Traits, true>(smem, args, [&] {
      const int role = Traits::kPacked ? thread_of_tile<Traits>() / 32 : warp;
      if (role == 0) {
        feed_bwd_stages<Traits>(smem, own.bwd, &q_map, &k_map, &v_map, &dout_map);
      } else if (role <= Traits::kGroups && threadIdx.x % 32 == 0) {
        add_dq_pieces(smem, own, role - 1);
      } else if (role == 3) {
        if constexpr (Traits::kCopiesMasks) feed_bwd_masks<Traits>(smem, args.bwd, mask);
        if constexpr (Traits::kPacked) clear_bwd_edges<Traits>(smem, own.bwd);
      }
    });
  } else {
    setmaxnreg_inc<Traits::kMultiplyingRegisters>();
    for_each_key_tile<Traits, false>(smem, args,
                                     [&] { multiply_bwd_tiles(smem, args.bwd, own.bwd, mask, warp / 4 - 1); });
  }
}

}  // namespace fastattn
