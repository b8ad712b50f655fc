// Keys and values in a cache on Hopper: how many a sequence has is read on the device, and a tile of them comes in
// boxes that each lie in one block of the cache.
//
// Boxes: have as many rows as divide both a tile and a block, whatever the two are. A lane for each box looks up its
//        block, all of them at the same time and before the warp waits for room, and copies the box. Boxes behind the
//        last key are left out: nobody has to have filled in the table so far.
// Edges: those of packed sequences: scores of keys behind the end are hidden, their rows of v cleared. Of q and out all
//        sequences have the same number of rows.
#pragma once

#include <numeric>

#include "attention/attention_cached_sm80.cuh"
#include "attention/attention_packed_sm90.cuh"

namespace fastattn {

// ---- where a batch entry lies

// A dense batch entry with a number of keys of its own.
struct CachedPlace : EntryPlace<true> {
  FASTATTN_DEVICE static int of_map(int batch) { return batch; }
  FASTATTN_DEVICE static int query_row(int query) { return query; }
  FASTATTN_DEVICE static int64_t lse_offset(const AttentionFwdArgs& args, int batch, int head) {
    return EntryPlace<false>::lse_offset(args, batch, head);
  }
};

// From a place in the order of a dense batch to the row tile, and to the keys that its sequence has; for one warp.
struct CachedWalk {
  PackedEntry* own;

  // With an entry for each warp of the block.
  FASTATTN_DEVICE explicit CachedWalk(PackedEntry* entries_smem) : own(&entries_smem[warp_of_block()]) {}

  // Whether there is such a place. All lanes of the warp call it together.
  FASTATTN_DEVICE bool reaches(const AttentionFwdArgs& args, int place, int places) {
    if (place >= places) return false;
    __syncwarp();  // everyone has done with the last one
    if (threadIdx.x % 32 == 0) {
      own->at = args.order.work(place, 0, true);
      ScoreArgs scores = args.scores;
      narrow_to_cached(scores, args.cache, own->at.batch);
      own->seqlen_q = scores.seqlen_q, own->seqlen_k = scores.seqlen_k, own->diagonal = scores.diagonal;
    }
    __syncwarp();
    return true;
  }

  // Of the place that was reached.
  FASTATTN_DEVICE const FwdWork& work(const AttentionFwdArgs&, int) const { return own->at; }
  FASTATTN_DEVICE CachedPlace entry() const { return {{own}}; }
};

// ---- copies

inline bool is_cached(const KvCache& cache) { return cache.block_size > 0; }

// Rows of a box of k or v, for tiles of `block_k` keys; 0 if TMA cannot copy such boxes: they start at whole patterns
// of the swizzle. What a box finds behind the end of a sequence's part of a cache in one piece is zero.
inline int cached_box_rows(const KvCache& cache, int block_k) {
  if (cache.table == nullptr) return block_k;
  const int rows = std::gcd(cache.block_size, block_k);
  return rows % 8 == 0 ? rows : 0;
}

// The phase of an mbarrier to wait for.
struct MBarrierPhase {
  uint64_t* barrier_smem;
  int parity;
};

// Keys [first, seqlen_k) of a sequence, of one head.
struct CachedKeys {
  const KvCache& cache;
  int batch, head, first, seqlen_k;
};

// Copies as many of them as a tile has to `tile_smem`, once that is empty, and completes their bytes at `full`; by one
// warp. Rows of boxes that have none stay as they are.
template <typename Tile>
FASTATTN_DEVICE void load_cached_tile_sm90(uint8_t* tile_smem, const TensorMap& map, int box_rows, uint64_t* full,
                                           MBarrierPhase empty, const CachedKeys& keys) {
  static_assert(Tile::kRows / 8 <= 32, "a lane a box");
  const int lane = static_cast<int>(threadIdx.x) % 32, tile_row = lane * box_rows, key = keys.first + tile_row;
  const bool has_box = tile_row < Tile::kRows && key < keys.seqlen_k;
  int row = 0, entry = 0;
  if (has_box) {
    const int block = key / keys.cache.block_size;
    row = key - block * keys.cache.block_size;
    entry = static_cast<int>(cache_entry(keys.cache, keys.batch, block));
  }
  const int boxes = __popc(__ballot_sync(kFullWarp, has_box));
  if (lane == 0) {
    mbarrier_wait(empty.barrier_smem, empty.parity);
    mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(boxes * box_rows * Tile::kPanels * Tile::kRowBytes));
  }
  __syncwarp();
  if (!has_box) return;
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    tma_load(tile_smem + panel * Tile::kPanelBytes + tile_row * Tile::kRowBytes, &map, full,
             {panel * Tile::kPanelCols, row, keys.head, entry});
  }
}

}  // namespace fastattn
