// Packed sequences in Hopper's backward: a block's arguments become those of its sequence, and the rows behind a
// sequence, which TMA, knowing only the whole tensors, brings of the next one, become zeros.
//
// Order: the grid is that of the longest sequence; a block whose keys lie past its own sequence's end leaves at once.
// Rows:  positions of TMA are rows of the tensors, all else counts from the sequence's first. Row statistics and sums
//        of dq are padded to 128 rows for each sequence: no tile of them belongs to two.
// Edges: k, v, q, dO   every one is a factor of a sum over keys or queries, where 0 * NaN of the next sequence would
//                      be NaN: a warp clears those rows in shared memory before the tile counts as full
//        dq            queries that do not exist have places of their own among the sums, which nobody reads
//        dk, dv        threads store the keys that exist, as of a dense batch
#pragma once

#include "attention/attention_bwd_stages_sm90.cuh"

namespace fastattn {

// What a block of packed sequences has of its own in shared memory. A dense one has no use for it.
template <typename Traits>
struct BwdPackedSmem {
  alignas(16) uint8_t args[Traits::kPacked ? sizeof(AttentionBwdSm90Args) : 16];
  BwdKeys<Traits> keys;
  // Of tiles with rows to clear: the copies are done. Such a tile is full when its rows are zeros.
  uint64_t k_arrived, v_arrived, q_arrived[Traits::kStages], dout_arrived[Traits::kDoutStages];
};

// All threads of the block come here.
template <typename Traits, typename Smem>
FASTATTN_DEVICE const AttentionBwdSm90Args& args_of_block(Smem& smem, const AttentionBwdSm90Args& args) {
  if constexpr (Traits::kPacked) {
    return share_entry(smem.packed.args, args, BwdKeys<Traits>(args.bwd).batch);
  } else {
    return args;
  }
}

// What a multiplying thread knows of its block's keys. Packed, it has no registers for them.
template <typename Traits>
using BwdGroupKeys = std::conditional_t<Traits::kPacked, const BwdKeys<Traits>&, const BwdKeys<Traits>>;

template <typename Traits, typename Smem>
FASTATTN_DEVICE BwdGroupKeys<Traits> keys_of_block(const Smem& smem, const AttentionBwdArgs& own) {
  if constexpr (Traits::kPacked) {
    return smem.packed.keys;
  } else {
    return BwdKeys<Traits>(own);
  }
}

// By one thread, before all others have met.
template <typename Traits>
FASTATTN_DEVICE void init_packed(BwdPackedSmem<Traits>& packed, const AttentionBwdArgs& own) {
  packed.keys = BwdKeys<Traits>(own);
  mbarrier_init(&packed.k_arrived, 1);
  mbarrier_init(&packed.v_arrived, 1);
  for (uint64_t& barrier : packed.q_arrived) mbarrier_init(&barrier, 1);
  for (uint64_t& barrier : packed.dout_arrived) mbarrier_init(&barrier, 1);
}

// Clears rows [row, Tile::kRows) of a tile that has arrived, by one warp; then it is full.
template <typename Tile>
FASTATTN_DEVICE void clear_edge(uint8_t* tile_smem, int row, uint64_t* arrived, int parity, uint64_t* full) {
  mbarrier_wait(arrived, parity);
  clear_last_rows<Tile>(tile_smem, row);
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(full);
}

// By a warp of its own, so that neither the copies nor the products wait for it: of the block's keys, and of the last
// queries of every head.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void clear_bwd_edges(Smem& smem, const AttentionBwdArgs& own) {
  using TileQ = typename Traits::TileQ;
  const BwdKeys<Traits> keys(own);
  if (keys.count < Traits::kBlockK) {
    clear_edge<typename Traits::TileK>(smem.k, keys.count, &smem.packed.k_arrived, 0, &smem.k_full);
    clear_edge<typename Traits::TileV>(smem.v, keys.count, &smem.packed.v_arrived, 0, &smem.v_full);
  }
  RingPosition<Traits::kStages> at;
  RingPosition<Traits::kDoutStages> dout_at;
  uint32_t parities = 0, dout_parities = 0;  // a bit a stage
  for (QueryTileWalk<Traits> walk(own, keys.batch, keys.head_kv, keys.tile, {keys.first, keys.first + keys.count},
                                  own.parts, keys.part);
       !walk.done(); walk.advance(), ++at.count, ++dout_at.count) {
    const int rows = own.scores.seqlen_q - walk.tile * Traits::kBlockQ;
    if (rows >= Traits::kBlockQ) continue;
    const int stage = at.stage(), dout_stage = dout_at.stage();
    clear_edge<TileQ>(smem.q[stage], rows, &smem.packed.q_arrived[stage], static_cast<int>(parities >> stage & 1),
                      &smem.q_full[stage]);
    clear_edge<TileQ>(smem.dout[dout_stage], rows, &smem.packed.dout_arrived[dout_stage],
                      static_cast<int>(dout_parities >> dout_stage & 1), &smem.dout_full[dout_stage]);
    parities ^= 1u << stage, dout_parities ^= 1u << dout_stage;
  }
}

}  // namespace fastattn
