// Forward attention on Hopper:  out = softmax(scores) v,  lse = log-sum-exp of each row.
// Work:    persistent blocks. One warp feeds rings of k and v tiles in shared memory by TMA; kGroups warpgroups have 64
//          query rows each and multiply by wgmma. All of them visit the same key tiles.
// Overlap: a warpgroup exponentiates the scores of one key tile while the tensor cores multiply the probabilities of
//          the tile before by v; warpgroups take turns in issuing products, so that one's softmax runs under the
//          other's products too. The rings run on across row tiles: the next one's q and first k arrive during the
//          epilogue.
// Memory:  q (kGroups tiles of 64 rows), kStages tiles of k and of v; one or two tiles of attn_mask a warpgroup and a
//          tile of out where they fit, else the mask is read from global memory and out takes q's place.
//          Probabilities never leave the registers; out leaves through shared memory by TMA.
// Order:   the warpgroups that multiply, whose loop (attend) is the timeline; the way out; the kernel. Read first
//          attention_fwd_traits_sm90.cuh, its tiles, and attention_fwd_stages_sm90.cuh, the warps that copy them.
// Packed:  sequences one behind the other have row tiles of their own; attention_packed_sm90.cuh.
// Cached:  lengths and where keys lie are found on the device, too; attention_cached_sm90.cuh.
// Numbers: fp16/bf16 inputs, fp32 scores, softmax and accumulation; probabilities are rounded for the product with v.
// Source:  Shah et al., "FlashAttention-3", arXiv:2407.08608, algorithms 1 and 2.
#pragma once

#include "attention/attention_fwd_stages_sm90.cuh"

namespace fastattn {

// ---- consumers: warpgroups

// Turns in issuing products: a warpgroup waits for the one before it, which hands over when its own are under way.
template <typename Traits>
FASTATTN_DEVICE void wait_for_products_turn(int group) {
  bar_sync(1 + group, 256);
}
template <typename Traits>
FASTATTN_DEVICE void give_products_turn(int group) {
  bar_arrive(1 + group, 256);
}

// What one warpgroup knows of its row tile.
template <typename Traits>
struct FwdRows {
  static constexpr int kBlockK = Traits::kBlockK;
  using Scores = float[1][kBlockK / 8][4];
  const AttentionFwdArgs& args;
  const FwdTileWork<Traits>& work;
  AttentionFwdSm90Smem<Traits>& smem;
  const MaskStages& mask;
  MaskRingPosition& mask_at;
  int group;
  QueryRows rows;  // of this lane
  OnlineSoftmax<1> softmax;
  DropoutState dropout;

  // A lambda's worth of state, so that the loop below reads as its timeline.
  FASTATTN_DEVICE bool probabilities(Scores& s, int tile, bool masked, float (&correction)[1][2]) {
    constexpr bool kPlain = Traits::kKind == ScoreKind::kPlain, kEverything = Traits::kKind == ScoreKind::kEverything;
    const int col0 = tile * kBlockK;
    const bool cut = tile < work.keys.full_begin || tile >= work.keys.full_end;
    modify_scores<Traits::kKind>(s, work.entry.scores(args.scores), rows, work.at.batch, col0, cut, [&] {
      if (masked) add_mask(s, col0);
    });
    const float factor = kPlain ? args.scores.scale_log2 : 1.0f;
    const bool raised = softmax.raise(s, factor, correction);
    softmax.exponentiate(s, factor);
    if constexpr (kEverything) {
      if (args.scores.dropout_threshold > 0) drop_probabilities(s, args.scores, dropout, rows, work.at.batch, col0);
    }
    return raised;
  }

 private:
  FASTATTN_DEVICE void add_mask(Scores& s, int col0) {
    if (mask.count == 0) return apply_mask(s, args.scores, rows, work.at.batch, col0);
    const int stage = mask_at.stage(mask), lane = static_cast<int>(threadIdx.x) % 32;
    mbarrier_wait(&smem.mask_full[stage][group], mask_at.parity(mask));
    apply_mask_stage(s, args.scores, mask, smem.mask(mask, stage, group), rows.first - work.first_row - 64 * group);
    fence_proxy_async();  // it is read before the next one comes in its place
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&smem.mask_empty[stage][group]);
    ++mask_at.count;
  }
};

// The two products of a key tile, by this warpgroup: s = q k^T, and o += p v.
template <typename Traits>
struct FwdProducts {
  using Element = typename Traits::Element;
  using TileK = typename Traits::TileK;
  using Position = RingPosition<Traits::kStages>;

  AttentionFwdSm90Smem<Traits>& smem;
  const typename Traits::TileQ q_tile;
  const uint32_t k_smem = smem_address(smem.k[0]), v_smem = smem_address(smem.v[0]);
  float s[1][Traits::kBlockK / 8][4];
  uint32_t p[Traits::kBlockK / 16][4];

  // Not an aggregate, which would clear s and p.
  FASTATTN_DEVICE FwdProducts(AttentionFwdSm90Smem<Traits>& smem_, int group)
      : smem(smem_), q_tile{smem_address(smem_.q[group])} {}

  FASTATTN_DEVICE void issue_scores(Position position) {
    wgmma_fence();
    issue_abt<Element>(s, q_tile, 0, TileK{k_smem + position.stage() * TileK::kBytes});
    wgmma_commit_group();
  }
  FASTATTN_DEVICE void issue_output(float (&o)[1][Traits::kHeadDim / 8][4], Position position) {
    mbarrier_wait(&smem.v_full[position.stage()], position.parity());
    wgmma_fence();
    issue_ab<Element>(o, p, TileK{v_smem + position.stage() * TileK::kBytes});
    wgmma_commit_group();
  }
};

// One pass over the keys: o = sum of p v, not normalised. `at` moves past the key tiles' stages.
template <typename Traits>
FASTATTN_DEVICE void attend(float (&o)[1][Traits::kHeadDim / 8][4], FwdRows<Traits>& rows,
                            AttentionFwdSm90Smem<Traits>& smem, RingPosition<Traits::kStages>& at, int group,
                            bool out_has_tile) {
  const bool releases = threadIdx.x % 32 == 0;
  const FwdTileWork<Traits>& work = rows.work;
  FwdProducts<Traits> products(smem, group);
  auto& s = products.s;

  MaskTileReader<!Traits::kHasMask> visible(rows.args.mask_tiles, work.at.batch, work.at.tile_head, work.at.row_tile,
                                            work.keys.end);
  int tile = visible.next(work.keys.begin);
  const bool any = tile < work.keys.end;
  RingPosition<Traits::kStages> before = at;  // of the last tile that s was made of
  for (bool first = true; tile < work.keys.end; first = false) {
    const bool masked = visible.is_partial(tile);
    mbarrier_wait(&smem.k_full[at.stage()], at.parity());
    if (!first) wait_for_products_turn<Traits>(group);
    products.issue_scores(at);
    // s of this tile is exponentiated under o += p v of the tile before; of the first, there is none.
    if (!first) {
      products.issue_output(o, before);
      give_products_turn<Traits>((group + 1) % Traits::kGroups);
      wgmma_wait_group<1>();
    } else {
      wgmma_wait_group<0>();
    }
    pin_accumulators(wgmma_registers(s));
    if (releases) mbarrier_arrive(&smem.k_empty[at.stage()]);
    float correction[1][2];
    const bool raised = rows.probabilities(s, tile, masked, correction);

    // Behind a branch, over which the compiler does not move it: else it waits first and exponentiates afterwards. The
    // warps of a group wait together, as wgmma asks for, whichever of them raised.
    if (!first) {
      wgmma_wait_group<0>();
      pin_accumulators(wgmma_registers(o));
      if (raised) for_each_score(o, [&](float& x, int m, int half, int, int) { x *= correction[m][half]; });
    }
    wgmma_wait_group<0>();
    pin_accumulators(wgmma_registers(o));
    if (releases && !first) mbarrier_arrive(&smem.v_empty[before.stage()]);
    pack_a<typename Traits::Element>(products.p, s);
    before = at;
    ++at.count;
    tile = visible.next(tile + 1);
  }
  if (out_has_tile) {
    // Without keys, lanes may still wait for q: were it given back, its barrier's phase would pass them by.
    __syncwarp();
    if (releases) mbarrier_arrive(&smem.q_empty[group]);
  }
  if (any) {
    products.issue_output(o, before);
    wgmma_wait_group<0>();
    pin_accumulators(wgmma_registers(o));
    if (releases) mbarrier_arrive(&smem.v_empty[before.stage()]);
  }
}

// ---- writing the result

// Normalises o and writes lse.
template <typename Traits>
FASTATTN_DEVICE void finish_fwd_rows(float (&o)[1][Traits::kHeadDim / 8][4], const FwdRows<Traits>& rows) {
  const AttentionFwdArgs& args = rows.args;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = rows.softmax.total(0, half);
    // A row that saw nothing has o = 0. Not total > 0, which would turn NaN into 0.
    const float normaliser = total == 0.0f ? 0.0f : args.scores.dropout_scale * rcp_approx(total);
#pragma unroll
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
      o[0][n][2 * half] *= normaliser;
      o[0][n][2 * half + 1] *= normaliser;
    }
    const int row = rows.rows.row(0, half);
    const auto& scores = rows.work.entry.scores(args.scores);
    if (row >= scores.seqlen_q * rows.rows.group || threadIdx.x % 4 != 0) continue;
    const int64_t head_lse = rows.work.entry.lse_offset(args, rows.work.at.batch, rows.rows.head_of(row));
    args.lse[head_lse + rows.rows.query_of(row)] = rows.softmax.lse_log2(0, half, total) * kLn2;
  }
}

// Each warp stores its own 16 rows: no warp waits for another.
template <typename Traits>
FASTATTN_DEVICE void store_fwd_rows(const float (&o)[1][Traits::kHeadDim / 8][4], const FwdTileWork<Traits>& work,
                                    AttentionFwdSm90Smem<Traits>& smem, const AttentionFwdArgs& args,
                                    const AttentionFwdMaps& maps, int group) {
  using TileQ = typename Traits::TileQ;
  const bool has_tile = maps.template out_has_tile<Traits>();
  const int warp_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  const bool stores = threadIdx.x % 32 == 0;
  uint8_t* const out_smem = smem.out(group, has_tile);
  if (has_tile) {
    if (stores) bulk_wait_group_read<0>();  // the last row tile's result has left
    __syncwarp();
  }
  write_rows<typename Traits::Element>(TileQ{smem_address(out_smem)}, warp_row, o);
  fence_proxy_async();
  __syncwarp();
  if constexpr (Traits::kPacked) {
    // A box of 16 rows that do not all exist would write the next sequence's.
    const QueryRows rows = Traits::query_rows(args, 0, work.at.tile_head);
    const int row = work.first_row + 64 * group + warp_row;
    const int count = work.entry.own->seqlen_q * rows.group - row;
    if (count < 16) {
      store_last_rows<Traits>(out_smem, warp_row, count, args, work.entry, rows, row);
      if (!has_tile && stores) mbarrier_arrive(&smem.q_empty[group]);
      return;
    }
  }
  if (!stores) return;
  const QueryRows rows = Traits::query_rows(args, 0, 0);
  const int row = work.first_row + 64 * group + warp_row;
#pragma unroll
  for (int panel = 0; panel < TileQ::kPanels; ++panel) {
    if (panel * TileQ::kPanelCols >= args.head_dim_v) break;
    tma_store(&maps.out, out_smem + panel * TileQ::kPanelBytes + warp_row * TileQ::kRowBytes,
              {panel * TileQ::kPanelCols, rows.head_in_group(row), work.entry.query_row(rows.query_of(row)),
               work.at.tile_head, work.entry.of_map(work.at.batch)});
  }
  bulk_commit_group();
  if (!has_tile) {
    bulk_wait_group_read<0>();
    mbarrier_arrive(&smem.q_empty[group]);  // and q may come into its place
  }
}

template <typename Traits>
FASTATTN_DEVICE void consume_fwd_tiles(AttentionFwdSm90Smem<Traits>& smem, const AttentionFwdArgs& args,
                                       const AttentionFwdMaps& maps, int row_tiles) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = warp_of_block() - 4, group = warp / 4;
  DropoutState dropout;
  if constexpr (Traits::kKind == ScoreKind::kEverything) dropout = load_dropout_state(args.scores);
  RingPosition<Traits::kStages> at;
  RingPosition<1> q_at;
  MaskRingPosition mask_at;
  if (group == Traits::kGroups - 1) give_products_turn<Traits>(0);
  FwdWalk<Traits> walk(smem.entries);
  for (int round = 0;; ++round, ++q_at.count) {
    const int place = next_place(smem, round);
    if (!walk.reaches(args, place, row_tiles)) break;
    const FwdTileWork<Traits> work = fwd_tile_work<Traits>(args, walk, place);
    // Of three warpgroups' registers none is left to keep what is made of the lane.
    constexpr bool kMakesAnew = Traits::kOwnLengths && Traits::kGroups == 3;
    const int first_row = work.first_row + 64 * group + 16 * (warp % 4) + (kMakesAnew ? opaque(lane) : lane) / 4;
    const QueryRows lane_rows = Traits::query_rows(args, first_row, work.at.tile_head);
    FwdRows<Traits> rows{args, work, smem, maps.mask, mask_at, group, lane_rows, {}, dropout};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = lane_rows.head_of(lane_rows.row(0, half));
      rows.softmax.start(0, half, args.sinks != nullptr ? args.sinks[head] * kLog2E : -INFINITY);
    }
    float o[1][Traits::kHeadDim / 8][4] = {};
    mbarrier_wait(&smem.q_full[group], q_at.parity());
    attend(o, rows, smem, at, group, maps.template out_has_tile<Traits>());
    finish_fwd_rows(o, rows);
    store_fwd_rows<Traits>(o, work, smem, args, maps, group);
  }
  if (group == 0) wait_for_products_turn<Traits>(0);  // takes back the turn that nobody needs any more
  if (lane == 0) bulk_wait_group_read<0>();           // shared memory outlives the stores that read it
}

// ---- kernel

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionFwdArgs args,
                              const __grid_constant__ AttentionFwdMaps maps, int row_tiles) {
  FASTATTN_DYNAMIC_SMEM(bytes);
  auto& smem = *reinterpret_cast<AttentionFwdSm90Smem<Traits>*>(bytes);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.q);
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
    prefetch_tensor_map(&maps.out);
    constexpr int kWarps = 4 * Traits::kGroups;
    for (int group = 0; group < Traits::kGroups; ++group) {
      mbarrier_init(&smem.q_full[group], 1);
      mbarrier_init(&smem.q_empty[group], 4);
      for (int stage = 0; Traits::kHasMask && stage < kMaxMaskStages; ++stage) {
        mbarrier_init(&smem.mask_full[stage][group], 1);
        mbarrier_init(&smem.mask_empty[stage][group], 4);
      }
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(&smem.k_full[stage], 1);
      mbarrier_init(&smem.v_full[stage], 1);
      mbarrier_init(&smem.k_empty[stage], kWarps);
      mbarrier_init(&smem.v_empty[stage], kWarps);
      if (Traits::kOwnLengths) mbarrier_init(&smem.v_arrived[stage], 1);
    }
    if constexpr (Traits::kPacked) smem.places.init(kWarps + 1);  // and the warp that clears
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<Traits::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) {
      produce_fwd_tiles(smem, args, maps, row_tiles);
    } else if (Traits::kHasMask && warp == 1) {
      produce_fwd_masks(smem, args, maps.mask, row_tiles);
    } else if constexpr (Traits::kOwnLengths) {
      if (warp == 1) clear_value_tails(smem, args, row_tiles);
    }
  } else {
    setmaxnreg_inc<Traits::kConsumerRegisters>();
    consume_fwd_tiles(smem, args, maps, row_tiles);
  }
}

}  // namespace fastattn
