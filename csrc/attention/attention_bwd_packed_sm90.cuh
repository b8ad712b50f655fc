// Packed sequences in Hopper's backward: a block takes tiles of keys one after another, its arguments become those of
// each one's sequence, and the rows behind a sequence, which TMA, knowing only the whole tensors, brings of the next
// one, become zeros.
//
// Order: attention_bwd_order_sm90.cuh. A block has done with a tile before it starts the next: only the place of that
//        is taken earlier, by the copying thread, which is done first. mbarriers start anew with each.
// Rows:  positions of TMA are rows of the tensors, all else counts from the sequence's first. Row statistics and sums
//        of dq are padded to 128 rows for each sequence: no tile of them belongs to two.
// Edges: k, v, q, dO   every one is a factor of a sum over keys or queries, where 0 * NaN of the next sequence would
//                      be NaN: a warp clears those rows in shared memory before the tile counts as full
//        dq            queries that do not exist have places of their own among the sums, which nobody reads
//        dk, dv        threads store the keys that exist, as of a dense batch
#pragma once

#include "attention/attention_bwd_stages_sm90.cuh"

namespace fastattn {

// Calls fn(barrier, arrivals) for each mbarrier that only packed sequences have.
template <typename Traits, typename Fn>
FASTATTN_DEVICE void for_each_packed_barrier(BwdPackedSmem<Traits>& packed, Fn fn) {
  if constexpr (!Traits::kPacked) return;
  fn(&packed.k_arrived, 1);
  fn(&packed.v_arrived, 1);
  for (uint64_t& barrier : packed.q_arrived) fn(&barrier, 1);
  for (uint64_t& barrier : packed.dout_arrived) fn(&barrier, 1);
}

// By one thread, before the others use them.
template <typename Smem>
FASTATTN_DEVICE void init_bwd_barriers(Smem& smem) {
  smem.for_each_barrier([](uint64_t* barrier, int arrivals) { mbarrier_init(barrier, arrivals); });
  fence_mbarrier_init();
}

// ---- one tile of keys after another

// Makes the block's arguments and keys those of its next tile; false if there is none. All threads come here, by whole
// warps. The feeding warps have few registers: they only take the place, while the others multiply.
template <typename Traits, bool kFeeds, typename Smem>
FASTATTN_DEVICE bool next_key_tile(Smem& smem, const AttentionBwdSm90Args& args, bool is_first) {
  constexpr int kBarrier = 3, kWords = sizeof(AttentionBwdSm90Args) / sizeof(uint32_t);
  BwdPackedSmem<Traits>& packed = smem.packed;
  const int thread = opaque(static_cast<int>(threadIdx.x)) - (kFeeds ? 0 : 128);
  if (kFeeds && thread == 0) packed.place = atomicAdd(args.order.next_place, 1);
  fence_proxy_async();  // copies come where threads have stored dk and dv
  __syncwarp();
  bar_sync(kBarrier, Traits::kThreads);
  if constexpr (!kFeeds) {
    for (int i = thread; i < kWords; i += Traits::kThreads - 128) {
      reinterpret_cast<uint32_t*>(packed.args)[i] = reinterpret_cast<const uint32_t*>(&args)[i];
    }
    if (thread == 0) {
      const int place = packed.place;
      packed.keys.batch = -1;
      if (place < bwd_places(args.bwd, args.order)) packed.keys = BwdTileKeys<Traits>(args.bwd, args.order, place);
      if (!is_first) smem.for_each_barrier([](uint64_t* barrier, int) { mbarrier_inval(barrier); });
      init_bwd_barriers(smem);
    }
    __syncwarp();
  }
  bar_sync(kBarrier, Traits::kThreads);
  if (packed.keys.batch < 0) return false;
  if (!kFeeds && thread == 0) narrow_to_entry(packed.own(), packed.keys.batch);
  __syncwarp();
  bar_sync(kBarrier, Traits::kThreads);
  return true;
}

// run() for the block's tile of keys, or for one after another; by all threads of the block.
template <typename Traits, bool kFeeds, typename Smem, typename Run>
FASTATTN_DEVICE void for_each_key_tile(Smem& smem, const AttentionBwdSm90Args& args, Run run) {
  if constexpr (!Traits::kPacked) {
    run();
  } else {
#pragma unroll 1
    for (bool is_first = true; next_key_tile<Traits, kFeeds>(smem, args, is_first); is_first = false) {
      run();
      __syncwarp();
    }
  }
}

// The arguments of the block's tile.
template <typename Traits, typename Smem>
FASTATTN_DEVICE const AttentionBwdSm90Args& args_of_block(Smem& smem, const AttentionBwdSm90Args& args) {
  if constexpr (Traits::kPacked) {
    return smem.packed.own();
  } else {
    return args;
  }
}

// ---- edges

// Clears rows [row, Tile::kRows) of a tile that has arrived, by one warp; then it is full.
template <typename Tile>
FASTATTN_DEVICE void clear_edge(uint8_t* tile_smem, int row, uint64_t* arrived, int parity, uint64_t* full) {
  // Anew, or every feeding warp keeps the lane for this one.
  const int thread = opaque(static_cast<int>(threadIdx.x));
  mbarrier_wait(arrived, parity);
  clear_last_rows<Tile>(tile_smem, row, thread);
  fence_proxy_async();
  __syncwarp();
  if (thread % 32 == 0) mbarrier_arrive(full);
}

// By a warp of its own, so that neither the copies nor the products wait for it: of the block's keys, and of the last
// queries of every head.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void clear_bwd_edges(Smem& smem, const AttentionBwdArgs& own) {
  using TileQ = typename Traits::TileQ;
  const BwdTileKeys<Traits> keys = smem.packed.keys;
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
