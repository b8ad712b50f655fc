// Attention backward on Hopper for head_dim 129 to 256: dq, dk and dv in one kernel.
// Work:    a block owns 64 keys of a key head and visits the visible query tiles of every query head of the group. Two
//          gradients of 64 keys would be 256 registers a thread of one warpgroup, so each of two has one:
//            values   S^T = k q^T,   P = exp2(S - lse),     dv += P^T dO
//            keys     dP^T = v dO^T, dX = P (dP - delta),   dk += dX^T q,   dq = dX k, 64 columns at a time
//          P^T and dX^T are left operands in registers, k, v and dX in shared memory. P goes from values to keys in
//          fp32, in the order of the registers; nothing comes back, so values runs ahead, and its exponentials fall
//          under the products of keys.
// Memory:  k and v stay; q with lse arrives in two stages, dO with delta in one or two; P and dX have one place each;
//          dq leaves in fp32, 16 KiB at a time from two places, by a bulk copy that adds (attention_bwd_sm90.cuh).
// Numbers: fp16/bf16 inputs, fp32 scores, P, dX and sums; P and dX are rounded for the products with dO, q and k.
// Order:   as attention_bwd_sm90.cuh, which is to be read first and shares the same feeding warp and dq's sums.
// Source:  as attention_bwd_sm90.cuh.
#pragma once

#include "attention/attention_bwd_packed_sm90.cuh"
#include "attention/attention_bwd_probabilities_sm90.cuh"
#include "attention/attention_bwd_stages_sm90.cuh"

namespace fastattn {

template <typename Element_, int kHeadDim_, ScoreKind kKind_, bool kPacked_, bool kSumsRows_>
struct AttentionBwdWideSm90Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ScoreKind kKind = kKind_;
  static constexpr bool kPacked = kPacked_;      // sequences, which have no mask
  static constexpr bool kSumsRows = kSumsRows_;  // of dS, for float32 gradients
  static constexpr bool kHasMask = kKind != ScoreKind::kPlain && !kPacked, kNoMask = !kHasMask;
  static constexpr int kBlockK = 64, kBlockQ = 64, kColTiles = kBlockQ / 8, kThreads = 384;
  static constexpr int kStages = 2, kDoutStages = kHeadDim <= 192 ? 2 : 1;
  static constexpr bool kEarlyDv = true;  // P is rounded when it is made
  static constexpr bool kCopiesMasks = kHasMask;
  static constexpr int kDqCols = 64, kDqPieces = kHeadDim / kDqCols, kDqPlaces = 2;
  static_assert(kHeadDim % kDqCols == 0 && kDqPieces >= 3 && kHeadDim <= 256, "pieces of dq, registers of a gradient");

  using TileK = TileSm90<kBlockK, kHeadDim>;
  using TileV = TileK;
  using TileQ = TileSm90<kBlockQ, kHeadDim>;  // and of dO
  using TileDx = TileSm90<kBlockK, kBlockQ>;
  using Scores = float[1][kColTiles][4];
  using Operand = uint32_t[kColTiles / 2][4];
  using Gradient = float[1][kHeadDim / 8][4];
  using DqPiece = float[1][kDqCols / 8][4];

  // A launch gives three warpgroups 168 registers a thread each, which they share out. Feeding takes more where it
  // looks for visible tiles of a mask; then values, which has no pieces of dq in flight, goes without.
  static constexpr int kFeedingRegisters = kHasMask ? 56 : 24;
  static constexpr int kKeysRegisters = 240, kValuesRegisters = 3 * 168 - kFeedingRegisters - kKeysRegisters;
};

template <typename Traits>
struct AttentionBwdWideSm90Smem {
  static constexpr int kStages = Traits::kStages, kDoutStages = Traits::kDoutStages;
  alignas(1024) uint8_t k[Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::TileV::kBytes];
  alignas(1024) uint8_t q[kStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dout[kDoutStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dx[Traits::TileDx::kBytes];
  alignas(1024) float dq[Traits::kDqPlaces][DqSum::kRows * Traits::kDqCols];
  static constexpr int kPBytes = Traits::kColTiles * 128 * 16;
  static constexpr int kOtherBytes = Traits::TileK::kBytes + Traits::TileV::kBytes +
                                     (kStages + kDoutStages) * Traits::TileQ::kBytes + Traits::TileDx::kBytes +
                                     Traits::kDqPlaces * DqSum::kRows * Traits::kDqCols * 4 + kPBytes;
  alignas(1024) uint8_t mask[bwd_mask_bytes<kOtherBytes, Traits::kBlockK, Traits::kCopiesMasks>()];
  alignas(16) float4 p[Traits::kColTiles][128];  // P (1 - t^2), negative where dropped
  alignas(16) float lse[kStages][Traits::kBlockQ];
  alignas(16) float delta[kDoutStages][Traits::kBlockQ];
  BwdStageInfo info[kStages], dq_info[Traits::kDqPlaces];
  uint64_t k_full, v_full;
  uint64_t q_full[kStages], q_empty[kStages];                // and lse
  uint64_t dout_full[kDoutStages], dout_empty[kDoutStages];  // and delta
  uint64_t mask_full[kMaxMaskStages], mask_empty[kMaxMaskStages];
  uint64_t p_full, p_empty;
  uint64_t dq_full[Traits::kDqPlaces], dq_empty[Traits::kDqPlaces];
  BwdPackedSmem<Traits> packed;
  alignas(16) float row_sums[Traits::kSumsRows ? 4 * 64 : 4];  // of each warp that has dX

  // Calls fn(barrier, arrivals) for each mbarrier that is used.
  template <typename Fn>
  FASTATTN_DEVICE void for_each_barrier(Fn fn) {
    constexpr int kGroupWarps = 4;
    fn(&k_full, 1);
    fn(&v_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      fn(&q_full[stage], 1);
      fn(&q_empty[stage], 2 * kGroupWarps);
    }
    for (int stage = 0; stage < kDoutStages; ++stage) {
      fn(&dout_full[stage], 1);
      fn(&dout_empty[stage], 2 * kGroupWarps);
    }
    for (int stage = 0; Traits::kCopiesMasks && stage < kMaxMaskStages; ++stage) {
      fn(&mask_full[stage], 1);
      fn(&mask_empty[stage], kGroupWarps);
    }
    fn(&p_full, kGroupWarps);
    fn(&p_empty, kGroupWarps);
    for (int place = 0; place < Traits::kDqPlaces; ++place) {
      fn(&dq_full[place], kGroupWarps);
      fn(&dq_empty[place], 1);
    }
    for_each_packed_barrier<Traits>(packed, fn);
  }
};

// ---- the storing warp

// By one thread: adds the pieces of dq to global memory as they come.
template <typename Traits>
FASTATTN_DEVICE void add_wide_dq_pieces(AttentionBwdWideSm90Smem<Traits>& smem, const AttentionBwdSm90Args& args) {
  BwdBlockKeys<Traits> keys = keys_of_block<Traits>(smem, args.bwd);
  const bool takes_turns = args.dq.turns != nullptr;
  RingPosition<Traits::kDqPlaces> at;
  for (;; ++at.count) {
    mbarrier_wait(&smem.dq_full[at.stage()], at.parity());
    const BwdStageInfo info = smem.dq_info[at.stage()];
    if (info.head < 0) break;
    const int piece = static_cast<int>(at.count % Traits::kDqPieces);
    const int64_t row_tile = args.dq.row_tile(statistics_head<Traits>(args.bwd, keys.batch, info.head),
                                              int64_t{info.query_tile} * Traits::kBlockQ);
    int* const turn = takes_turns ? args.dq.turn(row_tile, 0) : nullptr;
    if (takes_turns && piece == 0) wait_for_turn(turn, turn_of_block<Traits>(args.bwd, keys, info));
    bulk_reduce_add(args.dq.piece(row_tile, piece * Traits::kDqCols), smem.dq[at.stage()], sizeof smem.dq[0]);
    if constexpr (Traits::kSumsRows) {
      if (piece == 0) bulk_reduce_add(args.dq.row_sums(row_tile, 0), smem.row_sums, sizeof smem.row_sums);
    }
    bulk_commit_group();
    // The piece before this one has been read while this one came.
    bulk_wait_group_read<1>();
    if (at.count > 0) mbarrier_arrive(&smem.dq_empty[(at.count - 1) % Traits::kDqPlaces]);
    if (takes_turns && piece == Traits::kDqPieces - 1) {
      bulk_wait_group<0>();
      pass_turn(turn);
    }
  }
  bulk_wait_group_read<0>();  // shared memory outlives the copies that read it
}

// ---- the multiplying warpgroups

constexpr int kWideGroupsBarrier = 1, kWideKeysBarrier = 2;

// What both have in common.
template <typename Traits>
struct BwdWideGroup {
  using Element = typename Traits::Element;
  using TileK = typename Traits::TileK;
  using TileQ = typename Traits::TileQ;

  AttentionBwdWideSm90Smem<Traits>& smem;
  const AttentionBwdArgs &args, &own;  // every block's, and those of its sequence
  BwdBlockKeys<Traits> keys;
  const int thread, warp_row, lane;
  RingPosition<Traits::kStages> q_at;
  RingPosition<Traits::kDoutStages> dout_at;

  FASTATTN_DEVICE BwdWideGroup(AttentionBwdWideSm90Smem<Traits>& smem_, const AttentionBwdArgs& args_,
                               const AttentionBwdArgs& own_)
      : smem(smem_),
        args(args_),
        own(own_),
        keys(keys_of_block<Traits>(smem_, own_)),
        thread(static_cast<int>(threadIdx.x) % 128),
        warp_row(thread / 32 * 16),
        lane(thread % 32) {}

  FASTATTN_DEVICE TileQ q_tile() const { return {smem_address(smem.q[q_at.stage()])}; }
  FASTATTN_DEVICE TileQ dout_tile() const { return {smem_address(smem.dout[dout_at.stage()])}; }
  FASTATTN_DEVICE BwdStageInfo wait_for_q() const {
    mbarrier_wait(&smem.q_full[q_at.stage()], q_at.parity());
    return smem.info[q_at.stage()];
  }
  FASTATTN_DEVICE void wait_for_dout() const { mbarrier_wait(&smem.dout_full[dout_at.stage()], dout_at.parity()); }
  FASTATTN_DEVICE void arrive_by_warp(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  FASTATTN_DEVICE void release_q() const { arrive_by_warp(&smem.q_empty[q_at.stage()]); }
  FASTATTN_DEVICE void release_dout() const { arrive_by_warp(&smem.dout_empty[dout_at.stage()]); }
  FASTATTN_DEVICE void next() { ++q_at.count, ++dout_at.count; }

  // The block's result, through the place of k or v, which nobody reads any more once both have met.
  FASTATTN_DEVICE void store(const typename Traits::Gradient& gradient, float factor, uint8_t* tile_smem,
                             const AttentionTensor& tensor, int cols, bool is_aligned) const {
    if (args.parts.count() > 1) {
      return store_shared_sums<Traits>(gradient, factor, smem, own, args.scores.seqlen_k, /*of_dv=*/&tensor == &own.dv,
                                       warp_row);
    }
    bar_sync(kWideGroupsBarrier, 256);
    Element* const gmem =
        head_gmem<Element>(tensor, keys.batch, keys.head_kv) + int64_t{keys.first + warp_row} * tensor.stride_row;
    store_accumulators<Element>(gradient, factor, TileK{smem_address(tile_smem)}, tile_smem, warp_row,
                                TileOutput<Element>{gmem, tensor.stride_row, keys.count - warp_row, cols, is_aligned});
  }
};

template <typename Traits>
FASTATTN_DEVICE void make_dv(AttentionBwdWideSm90Smem<Traits>& smem, const AttentionBwdArgs& args,
                             const AttentionBwdArgs& own, const MaskStages& mask) {
  using Element = typename Traits::Element;
  BwdWideGroup<Traits> group(smem, args, own);
  const ScoreArgs& scores = args.scores;
  DropoutState dropout;
  if constexpr (Traits::kKind == ScoreKind::kEverything) dropout = load_dropout_state(scores);
  const typename Traits::TileK k_tile{smem_address(smem.k)};
  typename Traits::Gradient dv = {};
  mbarrier_wait(&smem.k_full, 0);
  for (;; group.next()) {
    const BwdStageInfo info = group.wait_for_q();
    if (info.head < 0) break;
    typename Traits::Scores s;
    typename Traits::Operand p;
    wgmma_fence();
    issue_abt<Element>(s, k_tile, 0, group.q_tile());
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin_accumulators(wgmma_registers(s));

    make_step_probabilities<Traits>(s, p, smem, tile_scores<Traits>(scores, own.scores), mask, dropout, group.keys,
                                    info, group.warp_row + group.lane / 4, smem.lse[group.q_at.stage()]);
    fence_proxy_async();  // lse is read before the next comes in its place
    group.release_q();
    mbarrier_wait(&smem.p_empty, (group.q_at.count & 1) ^ 1);
#pragma unroll
    for (int n = 0; n < Traits::kColTiles; ++n) {
      smem.p[n][group.thread] = make_float4(s[0][n][0], s[0][n][1], s[0][n][2], s[0][n][3]);
    }
    group.arrive_by_warp(&smem.p_full);

    group.wait_for_dout();
    wgmma_fence();
    issue_ab<Element>(dv, p, group.dout_tile());
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin_accumulators(wgmma_registers(dv));
    group.release_dout();
  }
  group.store(dv, scores.dropout_scale, smem.v, own.dv, args.head_dim_v, args.dv_is_aligned);
}

// Of one step: dX, in registers for dk and in shared memory for dq.
template <typename Traits>
FASTATTN_DEVICE void make_dx(typename Traits::Operand& dx, const BwdWideGroup<Traits>& group,
                             const typename Traits::Scores& dp) {
  AttentionBwdWideSm90Smem<Traits>& smem = group.smem;
  typename Traits::Scores p;
  mbarrier_wait(&smem.p_full, static_cast<int>(group.q_at.count & 1));
#pragma unroll
  for (int n = 0; n < Traits::kColTiles; ++n) {
    const float4 quad = smem.p[n][group.thread];
    p[0][n][0] = quad.x, p[0][n][1] = quad.y, p[0][n][2] = quad.z, p[0][n][3] = quad.w;
  }
  group.arrive_by_warp(&smem.p_empty);
  typename Traits::Operand rounded_before;
  [[maybe_unused]] float2 row_sums;
  make_score_gradients<Traits>(dx, rounded_before, dp, p, group.args.scores, smem.delta[group.dout_at.stage()],
                               row_sums);
  if constexpr (Traits::kSumsRows) {
    // They leave with the first piece of dq. Those of the step before have left: the last piece waited for a place,
    // which the first of kDqPieces > kDqPlaces had taken.
    reinterpret_cast<float2*>(smem.row_sums)[group.thread] = row_sums;
  }
  fence_proxy_async();  // delta is read before the next comes in its place
  group.release_dout();
  const typename Traits::TileDx dx_tile{smem_address(smem.dx)};
  bar_sync(kWideKeysBarrier, 128);  // all four warps have multiplied dX of the step before
#pragma unroll
  for (int n = 0; n < Traits::kColTiles / 2; ++n) {
    stmatrix(dx_tile.chunk_address(group.warp_row + group.lane % 16, 16 * n + group.lane / 16 * 8), dx[n]);
  }
  fence_proxy_async();
  bar_sync(kWideKeysBarrier, 128);
}

// Hands a piece of dq to the storing warp.
template <typename Traits>
FASTATTN_DEVICE void hand_over_wide_dq(const BwdWideGroup<Traits>& group, const typename Traits::DqPiece& dq,
                                       BwdStageInfo info, RingPosition<Traits::kDqPlaces>& at) {
  const int place = at.stage();
  mbarrier_wait(&group.smem.dq_empty[place], at.parity() ^ 1);
  if (group.thread == 0) group.smem.dq_info[place] = info;
  auto* quads = reinterpret_cast<float4*>(group.smem.dq[place]) + group.thread;
#pragma unroll
  for (int n = 0; n < Traits::kDqCols / 8; ++n) {
    quads[128 * n] = make_float4(dq[0][n][0], dq[0][n][1], dq[0][n][2], dq[0][n][3]);
  }
  fence_proxy_async();
  group.arrive_by_warp(&group.smem.dq_full[place]);
  ++at.count;
}

template <typename Traits>
FASTATTN_DEVICE void make_dk_and_dq(AttentionBwdWideSm90Smem<Traits>& smem, const AttentionBwdArgs& args,
                                    const AttentionBwdArgs& own) {
  using Element = typename Traits::Element;
  BwdWideGroup<Traits> group(smem, args, own);
  const typename Traits::TileK k_tile{smem_address(smem.k)}, v_tile{smem_address(smem.v)};
  const typename Traits::TileDx dx_tile{smem_address(smem.dx)};
  typename Traits::Gradient dk = {};
  RingPosition<Traits::kDqPlaces> dq_at;
  mbarrier_wait(&smem.k_full, 0);
  mbarrier_wait(&smem.v_full, 0);
  for (;; group.next()) {
    const BwdStageInfo info = group.wait_for_q();
    if (info.head < 0) break;
    typename Traits::Scores dp;
    typename Traits::Operand dx;
    group.wait_for_dout();
    wgmma_fence();
    issue_abt<Element>(dp, v_tile, 0, group.dout_tile());
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin_accumulators(wgmma_registers(dp));
    make_dx<Traits>(dx, group, dp);

    // Two pieces of dq are in flight, so that one leaves under the next, and dk among them.
    typename Traits::DqPiece dq[2];
    const auto issue_piece = [&](int piece) {
      wgmma_fence();
      issue_dq<Element>(dq[piece % 2], dx_tile, 0, k_tile, piece * Traits::kDqCols);
      wgmma_commit_group();
    };
    issue_piece(0);
    issue_piece(1);
    wgmma_fence();
    issue_ab<Element>(dk, dx, group.q_tile());
    wgmma_commit_group();
    wgmma_wait_group<2>();  // piece 1, dk
    pin_accumulators(wgmma_registers(dq[0]));
    hand_over_wide_dq<Traits>(group, dq[0], info, dq_at);
    issue_piece(2);
    wgmma_wait_group<2>();  // dk, piece 2
    pin_accumulators(wgmma_registers(dq[1]));
    hand_over_wide_dq<Traits>(group, dq[1], info, dq_at);
    if constexpr (Traits::kDqPieces > 3) issue_piece(3);
    wgmma_wait_group<Traits::kDqPieces - 3>();  // piece 3
    pin_accumulators(wgmma_registers(dk));
    pin_accumulators(wgmma_registers(dq[0]));
    group.release_q();
    hand_over_wide_dq<Traits>(group, dq[0], info, dq_at);
    if constexpr (Traits::kDqPieces > 3) {
      wgmma_wait_group<0>();
      pin_accumulators(wgmma_registers(dq[1]));
      hand_over_wide_dq<Traits>(group, dq[1], info, dq_at);
    }
  }
  hand_over_wide_dq<Traits>(group, {}, {}, dq_at);
  group.store(dk, args.scale, smem.k, own.dk, args.head_dim, args.dk_is_aligned);
}

// ---- the kernel

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_bwd_wide_sm90_kernel(const __grid_constant__ AttentionBwdSm90Args args,
                                   const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                   const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                                   const __grid_constant__ MaskStages mask) {
  FASTATTN_DYNAMIC_SMEM(bytes);
  auto& smem = *reinterpret_cast<AttentionBwdWideSm90Smem<Traits>*>(bytes);
  const AttentionBwdSm90Args& own = args_of_block<Traits>(smem, args);
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map, &dout_map}) prefetch_tensor_map(map);
    if (!Traits::kPacked) init_bwd_barriers(smem);
  }
  if (!Traits::kPacked) __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < 4) {
    setmaxnreg_dec<Traits::kFeedingRegisters>();
    for_each_key_tile<Traits, true>(smem, args, [&] {
      if (warp == 0) {
        feed_bwd_stages<Traits>(smem, own.bwd, &q_map, &k_map, &v_map, &dout_map);
      } else if (warp == 1 && threadIdx.x % 32 == 0) {
        add_wide_dq_pieces(smem, own);
      } else if (warp == 2) {
        if constexpr (Traits::kCopiesMasks) feed_bwd_masks<Traits>(smem, args.bwd, mask);
        if constexpr (Traits::kPacked) clear_bwd_edges<Traits>(smem, own.bwd);
      }
    });
  } else if (warp < 8) {
    setmaxnreg_inc<Traits::kValuesRegisters>();
    for_each_key_tile<Traits, false>(smem, args, [&] { make_dv(smem, args.bwd, own.bwd, mask); });
  } else {
    setmaxnreg_inc<Traits::kKeysRegisters>();
    for_each_key_tile<Traits, false>(smem, args, [&] { make_dk_and_dq(smem, args.bwd, own.bwd); });
  }
}

}  // namespace fastattn
