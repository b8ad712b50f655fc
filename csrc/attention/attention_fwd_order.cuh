// The order in which the forward works on its row tiles, and which of them a persistent block gets.
//
//   sections of heads   whose k and v fit the L2 cache together, so that blocks that run at the same time share them;
//   row tiles           in them from the last to the first: of the causal triangle those that take longest start first;
//   heads               of one row tile next to each other.
//
// That serves kernels with a block for each row tile, which the card hands out as others end. Persistent blocks take
// the tiles in rounds, every other one backwards, and need more: two rounds give all blocks the same only where lengths
// change steadily, and from one section to the next they would jump from the shortest to the longest, once in two
// rounds if a section has about so many tiles, and then always for the same blocks. So their sections go up and down in
// turn. Of a causal triangle of 16384 rows on 132 multiprocessors the busiest then has 1.002 times the mean, not 1.7
// times. Packed sequences, whose lengths change from one to the next, are taken from a counter instead
// (attention_packed_sm90.cuh).
#pragma once

#include <cstdint>

#include "common/cuda.cuh"

namespace fastattn {

// What one block does.
struct FwdWork {
  int batch, tile_head, row_tile, split;
};

struct FwdOrder {
  int batch = 0, tile_heads = 0, row_tiles = 0;  // (batch, tile head)s have row_tiles tiles each
  int heads_per_section = 1;                     // of batch * tile_heads

  // The place is counted from 0 to batch * tile_heads * row_tiles.
  FASTATTN_DEVICE FwdWork work(int place, int split, bool alternates) const {
    const int total = batch * tile_heads;
    const int section_places = heads_per_section * row_tiles;
    const int section = place / section_places, within = place % section_places;
    const int first_head = section * heads_per_section;
    const int section_heads = min(heads_per_section, total - first_head);
    const int batch_head = first_head + within % section_heads, nth_tile = within / section_heads;
    // The last section goes down in any case: to the shortest, at the end of all.
    const bool goes_up = alternates && ((total - 1) / heads_per_section - section) % 2 == 1;
    return {batch_head / tile_heads, batch_head % tile_heads, goes_up ? nth_tile : row_tiles - 1 - nth_tile, split};
  }

  // The same for the places of one of packed sequences, which has its own number of row tiles.
  FASTATTN_DEVICE FwdWork work_of_sequence(int sequence, int own_row_tiles, int place) const {
    FwdWork work = FwdOrder{1, tile_heads, own_row_tiles, heads_per_section}.work(place, 0, false);
    work.batch = sequence;
    return work;
  }
};

// The place of this round of a persistent block; the last round may lead past the end.
FASTATTN_DEVICE int place_of_round(int round, int block, int blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// Heads of k and v, of `heads` in all, that fit half of the smallest L2 cache among the cards of compute capability 8.0
// and newer that have a large one; about the same number in each section.
inline int64_t kv_heads_per_section(int64_t heads, int64_t bytes_per_head) {
  constexpr int64_t kCacheBytes = 20 << 20;
  const int64_t fit = kCacheBytes / (bytes_per_head + 1) < 1 ? 1 : kCacheBytes / (bytes_per_head + 1);
  const int64_t sections = heads < 1 ? 1 : (heads + fit - 1) / fit;
  return heads < 1 ? 1 : (heads + sections - 1) / sections;
}

}  // namespace fastattn
