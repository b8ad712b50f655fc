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
// Order:   what a block does; the warps that copy; the warpgroups that multiply, whose loop (attend) is the timeline;
//          the way out; the kernel. attention_fwd_traits_sm90.cuh has tiles and shared memory and is to be read first.
// Packed:  sequences one behind the other have row tiles of their own; attention_packed_sm90.cuh.
// Cached:  lengths and where keys lie are found on the device, too; attention_cached_sm90.cuh.
// Numbers: fp16/bf16 inputs, fp32 scores, softmax and accumulation; probabilities are rounded for the product with v.
// Source:  Shah et al., "FlashAttention-3", arXiv:2407.08608, algorithms 1 and 2.
#pragma once

#include "attention/attention_fwd_traits_sm90.cuh"

namespace fastattn {

// ---- what a block does

template <typename Traits>
using FwdEntry = std::conditional_t<Traits::kCached, CachedPlace, EntryPlace<Traits::kPacked>>;
template <typename Traits>
using FwdWalk = std::conditional_t<Traits::kCached, CachedWalk, EntryWalk<Traits>>;

// One row tile of one head, or of the heads packed into its rows, and the key tiles that it visits.
template <typename Traits>
struct FwdTileWork {
  std::conditional_t<Traits::kOwnLengths, const FwdWork&, FwdWork> at;
  FwdEntry<Traits> entry;
  int first_row, head_kv;
  KeyTiles keys;
};

// The place in the order of the row tile that this block takes in this round.
FASTATTN_DEVICE int row_tile_of_round(int round) {
  return place_of_round(round, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

// The same, by each warp but the copying one; packed blocks take places from a counter.
template <typename Traits>
FASTATTN_DEVICE int next_place(AttentionFwdSm90Smem<Traits>& smem, int round) {
  if constexpr (Traits::kPacked) {
    return smem.places.read(round);
  } else {
    return row_tile_of_round(round);
  }
}

template <typename Traits>
FASTATTN_DEVICE FwdTileWork<Traits> fwd_tile_work(const AttentionFwdArgs& args, const FwdWalk<Traits>& walk,
                                                  int place) {
  FwdTileWork<Traits> work{walk.work(args, place), walk.entry(), 0, 0, {}};
  work.first_row = work.at.row_tile * Traits::kBlockQ;
  const QueryRows rows = Traits::query_rows(args, 0, 0);
  work.head_kv = rows.group > 1 ? work.at.tile_head : work.at.tile_head / (args.heads / args.heads_kv);
  const auto& scores = work.entry.scores(args.scores);
  const int end_row = min(work.first_row + Traits::kBlockQ, scores.seqlen_q * rows.group);
  work.keys = key_tiles<Traits::kBlockK>(scores, {rows.query_of(work.first_row), rows.query_of(end_row - 1) + 1});
  return work;
}

// ---- producers: a warp, of which one lane waits and copies, and another for attn_mask

// What one lane copies, stage by stage. The first round finds every stage empty.
template <typename Traits>
struct FwdProducer {
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  using Work = FwdTileWork<Traits>;

  AttentionFwdSm90Smem<Traits>& smem;
  const AttentionFwdArgs& args;
  const AttentionFwdMaps& maps;
  const bool copies = threadIdx.x == 0;
  RingPosition<Traits::kStages> k_at = {}, v_at = {};
  RingPosition<1> q_at = {};

  FASTATTN_DEVICE void load_k(const Work& work, int tile) {
    const int stage = k_at.stage();
    load_keys(work, tile, smem.k[stage], maps.k, &smem.k_full[stage], {&smem.k_empty[stage], k_at.parity() ^ 1});
    ++k_at.count;
  }
  FASTATTN_DEVICE void load_v(const Work& work, int tile) {
    const int stage = v_at.stage();
    const bool cleared = work.entry.ends_in(tile * Traits::kBlockK, Traits::kBlockK);
    uint64_t* const full = cleared ? &smem.v_arrived[stage] : &smem.v_full[stage];
    load_keys(work, tile, smem.v[stage], maps.v, full, {&smem.v_empty[stage], v_at.parity() ^ 1});
    ++v_at.count;
  }
  FASTATTN_DEVICE void load_q(const Work& work) {
    if (copies) {
#pragma unroll
      for (int group = 0; group < Traits::kGroups; ++group) {
        mbarrier_wait(&smem.q_empty[group], q_at.parity() ^ 1);
        mbarrier_arrive_expect_tx(&smem.q_full[group], TileQ::kBytes);
        const QueryRows rows = Traits::query_rows(args, 0, 0);
        const int row = work.first_row + 64 * group;
#pragma unroll
        for (int panel = 0; panel < TileQ::kPanels; ++panel) {
          tma_load(smem.q[group] + panel * TileQ::kPanelBytes, &maps.q, &smem.q_full[group],
                   {panel * TileQ::kPanelCols, rows.head_in_group(row), work.entry.query_row(rows.query_of(row)),
                    work.at.tile_head, work.entry.of_map(work.at.batch)});
        }
      }
    }
    ++q_at.count;
  }

 private:
  // A tile of k or v to `place`, once that is empty.
  FASTATTN_DEVICE void load_keys(const Work& work, int tile, uint8_t* place, const TensorMap& map, uint64_t* full,
                                 MBarrierPhase empty) {
    const int first = tile * Traits::kBlockK;
    if constexpr (Traits::kCached) {
      const CachedKeys keys{args.cache, work.at.batch, work.head_kv, first, work.entry.own->seqlen_k};
      load_cached_tile_sm90<TileK>(place, map, maps.key_box_rows, full, empty, keys);
    } else if (copies) {
      mbarrier_wait(empty.barrier_smem, empty.parity);
      mbarrier_arrive_expect_tx(full, TileK::kBytes);
      load_tile_sm90<TileK>(place, &map, full, work.entry.key_row(first), work.head_kv,
                            work.entry.of_map(work.at.batch));
    }
  }
};

template <typename Traits>
FASTATTN_DEVICE void produce_fwd_tiles(AttentionFwdSm90Smem<Traits>& smem, const AttentionFwdArgs& args,
                                       const AttentionFwdMaps& maps, int row_tiles) {
  FwdProducer<Traits> producer{smem, args, maps};
  FwdWalk<Traits> walk(smem.entries);
  for (int round = 0;; ++round) {
    int place;
    if constexpr (Traits::kPacked) {
      place = smem.places.take(round, args.next_place);
    } else {
      place = row_tile_of_round(round);
    }
    if (!walk.reaches(args, place, row_tiles)) break;
    const FwdTileWork<Traits> work = fwd_tile_work<Traits>(args, walk, place);
    MaskTileReader<!Traits::kHasMask> visible(args.mask_tiles, work.at.batch, work.at.tile_head, work.at.row_tile,
                                              work.keys.end);
    int tile = visible.next(work.keys.begin);
    if (tile < work.keys.end) producer.load_k(work, tile);
    producer.load_q(work);
    // In the order in which the consumers need them: k of one tile before v of the tile before.
#pragma unroll 1
    while (tile < work.keys.end) {
      const int next = visible.next(tile + 1);
      if (next < work.keys.end) producer.load_k(work, next);
      producer.load_v(work, tile);
      tile = next;
    }
  }
}

// By a warp of its own, which waits for nothing else: the tiles of attn_mask that must be looked at.
template <typename Traits>
FASTATTN_DEVICE void produce_fwd_masks(AttentionFwdSm90Smem<Traits>& smem, const AttentionFwdArgs& args,
                                       const MaskStages& mask, int row_tiles) {
  if (mask.count == 0) return;
  MaskRingPosition at;
  FwdWalk<Traits> walk(smem.entries);
  for (int round = 0; walk.reaches(args, row_tile_of_round(round), row_tiles); ++round) {
    const FwdTileWork<Traits> work = fwd_tile_work<Traits>(args, walk, row_tile_of_round(round));
    MaskTileReader<false> visible(args.mask_tiles, work.at.batch, work.at.tile_head, work.at.row_tile, work.keys.end);
    for (int tile = visible.next(work.keys.begin); tile < work.keys.end; tile = visible.next(tile + 1)) {
      if (!visible.is_partial(tile)) continue;
      const int stage = at.stage(mask), group = static_cast<int>(threadIdx.x) % 32;
      if (group < Traits::kGroups) {
        mbarrier_wait(&smem.mask_empty[stage][group], at.parity(mask) ^ 1);
        load_mask_stage(smem.mask(mask, stage, group), mask, &smem.mask_full[stage][group], work.first_row + 64 * group,
                        tile * Traits::kBlockK, work.at.tile_head, work.at.batch);
      }
      __syncwarp();
      ++at.count;
    }
  }
}

// The rows of v behind a sequence's last key are the next one's, or anything. Their probabilities are 0, but 0 * NaN is
// NaN: they become zeros on their way, by a warp of its own, so that neither the copies nor the products wait for it.
template <typename Traits>
FASTATTN_DEVICE void clear_value_tails(AttentionFwdSm90Smem<Traits>& smem, const AttentionFwdArgs& args,
                                       int row_tiles) {
  RingPosition<Traits::kStages> v_at;
  uint32_t parities = 0;  // a bit a stage
  FwdWalk<Traits> walk(smem.entries);
  for (int round = 0;; ++round) {
    const int place = next_place(smem, round);
    if (!walk.reaches(args, place, row_tiles)) break;
    const FwdTileWork<Traits> work = fwd_tile_work<Traits>(args, walk, place);
    if (work.keys.end == work.keys.begin) continue;
    const int last_key = (work.keys.end - 1) * Traits::kBlockK;
    v_at.count += static_cast<uint32_t>(work.keys.end - work.keys.begin);
    if (!work.entry.ends_in(last_key, Traits::kBlockK)) continue;
    const int stage = RingPosition<Traits::kStages>{v_at.count - 1}.stage();
    mbarrier_wait(&smem.v_arrived[stage], static_cast<int>(parities >> stage & 1));
    clear_last_rows<typename Traits::TileK>(smem.v[stage], work.entry.own->seqlen_k - last_key);
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&smem.v_full[stage]);
    parities ^= 1u << stage;
  }
}

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
