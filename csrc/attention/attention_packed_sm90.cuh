// Packed sequences on Hopper: where the sequence of a row tile lies, which row tile a persistent block takes next, and
// the edges of a sequence, where TMA, which knows only the whole tensors, would reach into the next one.
//
// Order: sequences one after another, each with the row tiles that it has, so that no place is empty. Only the device
//        knows the lengths: each warp finds the sequence of a place by itself, 32 sequences at a time, from where it
//        found the last. Row tiles take any time, so a block takes its next place from a counter when the copies of its
//        last tile have started.
// Edges: q and k     rows behind the end are read; results of such queries are not stored, scores of such keys hidden
//        v           they are cleared in shared memory (clear_value_tails)
//        out         the last rows are stored by threads
#pragma once

#include "attention/attention_fwd_sm80.cuh"
#include "attention/attention_packed.cuh"
#include "attention/attention_tile_sm90.cuh"

namespace fastattn {

// ---- where a batch entry lies. In a dense batch, it is an entry of the tensors and all have the same lengths.

// What a warp knows of the row tile and the sequence that it works on, and of the 32 among which it found it. In shared
// memory: of registers the loops have none to spare.
struct PackedEntry {
  FwdWork at;
  int first_query, first_key;  // rows of the tensors
  int seqlen_q, seqlen_k, diagonal;
  int first_of_32, places_before;
};

template <bool kPacked>
struct EntryPlace {
  FASTATTN_DEVICE static const ScoreArgs& scores(const ScoreArgs& args) { return args; }
  FASTATTN_DEVICE static int of_map(int batch) { return batch; }
  FASTATTN_DEVICE static int query_row(int query) { return query; }
  FASTATTN_DEVICE static int key_row(int key) { return key; }
  FASTATTN_DEVICE static int64_t lse_offset(const AttentionFwdArgs& args, int batch, int head) {
    return (int64_t{batch} * args.heads + head) * args.scores.seqlen_q;
  }
  FASTATTN_DEVICE static constexpr bool ends_in(int, int) { return false; }
};

template <>
struct EntryPlace<true> {
  const PackedEntry* own;

  FASTATTN_DEVICE ScoreArgs scores(const ScoreArgs& args) const {
    ScoreArgs scores = args;
    scores.seqlen_q = own->seqlen_q, scores.seqlen_k = own->seqlen_k, scores.diagonal = own->diagonal;
    return scores;
  }
  FASTATTN_DEVICE static int of_map(int) { return 0; }
  FASTATTN_DEVICE int query_row(int query) const { return own->first_query + query; }
  FASTATTN_DEVICE int key_row(int key) const { return own->first_key + key; }
  FASTATTN_DEVICE int64_t lse_offset(const AttentionFwdArgs& args, int, int head) const {
    return head * args.packed.q.total + own->first_query;
  }
  // Whether a tile of keys has some that exist and some that do not.
  FASTATTN_DEVICE bool ends_in(int first, int keys) const { return first + keys > own->seqlen_k; }
};

// ---- which row tile is next

// Places that the copying warp has taken, for the other warps of the block.
template <bool kPacked>
struct PlaceRing {};

template <>
struct PlaceRing<true> {
  static constexpr int kSlots = 2;
  int place[kSlots];
  uint64_t full[kSlots], empty[kSlots];  // of its reader's warps each arrives

  // By one thread, before the others use it.
  FASTATTN_DEVICE void init(int readers) {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(&full[slot], 1);
      mbarrier_init(&empty[slot], readers);
    }
  }

  // By the copying warp: takes a place, which the blocks' first ones are not counted among, and hands it on.
  FASTATTN_DEVICE int take(int round, int* next_place) {
    int taken = static_cast<int>(blockIdx.x);
    if (threadIdx.x % 32 == 0) {
      if (round > 0) taken = static_cast<int>(gridDim.x) + atomicAdd(next_place, 1);
      const int slot = round % kSlots;
      mbarrier_wait(&empty[slot], (round / kSlots + 1) % 2);
      place[slot] = taken;
      mbarrier_arrive(&full[slot]);
    }
    return __shfl_sync(kFullWarp, taken, 0);
  }

  // By every warp of the others: what the copying warp took in this round.
  FASTATTN_DEVICE int read(int round) {
    const int slot = round % kSlots;
    mbarrier_wait(&full[slot], round / kSlots % 2);
    const int taken = place[slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&empty[slot]);
    return taken;
  }
};

// From a place in the order of all row tiles to the row tile, for one warp. Places are asked for in rising order.
template <typename Traits, bool kPacked = Traits::kPacked>
struct EntryWalk {
  FASTATTN_DEVICE explicit EntryWalk(PackedEntry*) {}
  FASTATTN_DEVICE static bool reaches(const AttentionFwdArgs&, int place, int places) { return place < places; }
  FASTATTN_DEVICE static FwdWork work(const AttentionFwdArgs& args, int place) {
    return args.order.work(place, 0, true);
  }
  FASTATTN_DEVICE static EntryPlace<false> entry() { return {}; }
};

template <typename Traits>
struct EntryWalk<Traits, true> {
  PackedEntry* own;

  // With an entry for each warp of the block.
  FASTATTN_DEVICE explicit EntryWalk(PackedEntry* entries_smem) : own(&entries_smem[warp_of_block()]) {
    if (threadIdx.x % 32 == 0) own->first_of_32 = own->places_before = 0;
  }

  // Whether there is such a place. All lanes of the warp call it together.
  FASTATTN_DEVICE bool reaches(const AttentionFwdArgs& args, int place, int) {
    const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
    __syncwarp();
    int first = own->first_of_32, before = own->places_before;
    for (; first < args.batch; first += 32) {
      int tiles = 0;
      if (first + lane < args.batch) {
        const IndexRange queries = packed_sequence(args.packed.q, first + lane, args.scores.seqlen_q);
        const int rows = static_cast<int>(queries.end - queries.begin) * args.group;
        tiles = (rows + Traits::kBlockQ - 1) / Traits::kBlockQ;
      }
      const int places = tiles * args.order.tile_heads, end = before + warp_prefix_sum(places);
      const uint32_t behind = __ballot_sync(kFullWarp, place < end);
      if (behind != 0) {
        const int found = __ffs(static_cast<int>(behind)) - 1;
        const int row_tiles = __shfl_sync(kFullWarp, tiles, found);
        const int sequence_place = place - __shfl_sync(kFullWarp, end - places, found);
        __syncwarp();  // everyone has done with the last one
        if (lane == 0) {
          own->at = args.order.work_of_sequence(first + found, row_tiles, sequence_place);
          own->first_of_32 = first, own->places_before = before;
        }
        // One thing after the other, or the compiler mixes them and runs out of three warpgroups' registers.
        if constexpr (Traits::kGroups == 3) __syncwarp();
        if (lane == 0) remember_entry(args);
        __syncwarp();
        return true;
      }
      before = __shfl_sync(kFullWarp, end, 31);
    }
    return false;
  }

  // Of the place that was reached.
  FASTATTN_DEVICE const FwdWork& work(const AttentionFwdArgs&, int) const { return own->at; }
  FASTATTN_DEVICE EntryPlace<true> entry() const { return {own}; }

 private:
  FASTATTN_DEVICE void remember_entry(const AttentionFwdArgs& args) {
    ScoreArgs scores = args.scores;
    const EntryRows rows = narrow_to_entry(scores, args.packed, own->at.batch);
    own->first_query = static_cast<int>(rows.query), own->first_key = static_cast<int>(rows.key);
    own->seqlen_q = scores.seqlen_q, own->seqlen_k = scores.seqlen_k, own->diagonal = scores.diagonal;
  }
};

// ---- edges

// Stores the first `count` (below 16, maybe none) of a warp's 16 rows of out from the tile at `out_smem`, row
// `warp_row` and on; the first is row `row` of the head or packed heads of `rows`.
template <typename Traits>
FASTATTN_DEVICE void store_last_rows(uint8_t* out_smem, int warp_row, int count, const AttentionFwdArgs& args,
                                     const EntryPlace<true>& entry, const QueryRows& rows, int row) {
  using Element = typename Traits::Element;
  const typename Traits::TileQ tile{smem_address(out_smem)};
  constexpr int kChunks = Traits::kHeadDim / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count * kChunks; i += 32) {
    const int nth = i / kChunks, col = i % kChunks * 8;
    if (col >= args.head_dim_v) continue;
    Element* const dst = static_cast<Element*>(args.out.data) +
                         int64_t{entry.query_row(rows.query_of(row + nth))} * args.out.stride_row +
                         rows.head_of(row + nth) * args.out.stride_head + col;
    store_staged_chunk(dst, staged_place(tile, out_smem, warp_row + nth, col), args.head_dim_v - col,
                       args.out_is_aligned);
  }
  fence_proxy_async();  // the rows are read before q may come in their place
  __syncwarp();
}

}  // namespace fastattn
