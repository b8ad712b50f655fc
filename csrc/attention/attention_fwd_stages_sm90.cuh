// What feeds Hopper's forward attention: which row tile a block has, and the warps that bring its tiles.
// Copies:  one lane brings q, k and v by TMA into rings of stages, another warp the tiles of attn_mask. Both visit the
//          key tiles that the multiplying warpgroups visit, in that order, and run on across row tiles.
// Packed:  where a sequence ends within a tile of v, the warp that has no mask to bring clears the rows behind it.
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

}  // namespace fastattn
