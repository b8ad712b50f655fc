// Keys and values of a cache on their way to shared memory: what attention_fwd_cached_kernel does that the other
// forward kernels do not.
#pragma once

#include "attention/attention_products_sm80.cuh"
#include "attention/attention_scores.cuh"
#include "attention/kv_cache.h"

namespace fastattn {

// Makes scores those of sequence `batch`, whose last query stands at its last key.
FASTATTN_DEVICE void narrow_to_cached(ScoreArgs& scores, const KvCache& cache, int batch) {
  scores.seqlen_k = tokens_before(cache, batch) + cache.appended;
  scores.diagonal = scores.seqlen_k - scores.seqlen_q;
}

// Tokens of sequence `batch` from `token` on, of one head, whose row 0 of entry 0 of the cache is at `head_gmem`.
template <typename Element>
struct CachedRows {
  const KvCache& cache;
  const Element* head_gmem;
  int64_t stride_entry, stride_row;
  int batch, token;

  // Row `within` of block `block` of the sequence.
  FASTATTN_DEVICE const Element* row(int block, int within) const {
    return head_gmem + cache_entry(cache, batch, block) * stride_entry + within * stride_row;
  }
};

// load_tile of the first `rows` of them. One look at the table for a row, which follows on others of the same line.
template <int kThreads, typename Tile, typename Element>
FASTATTN_DEVICE void load_cached_tile(Tile tile, const CachedRows<Element>& cached, int rows, int cols) {
  const int block_size = cached.cache.block_size;
  const int first = cached.token + static_cast<int>(threadIdx.x) / 8;
  int block = first / block_size, within = first - block * block_size;
  load_tile_rows<kThreads>(tile, rows, cols, [&](int row) {
    // Rows past the end are not read, and may lie past the end of the table, too.
    const Element* row_gmem = row < rows ? cached.row(block, within) : cached.head_gmem;
    for (within += kThreads / 8; within >= block_size; within -= block_size) ++block;
    return row_gmem;
  });
}

// The same where rows are not 16-byte aligned: element by element, through registers, which does not overlap with
// anything, but needs no copy of the cache. `tile_smem`: where the tile is.
template <int kThreads, typename Tile, typename Element>
FASTATTN_DEVICE void load_unaligned_cached_tile(Tile tile, uint8_t* tile_smem, const CachedRows<Element>& cached,
                                                int rows, int cols) {
  constexpr int kChunks = Tile::kCols / Tile::kChunkElems;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * Tile::kChunkElems, place = cached.token + row;
    const int block = place / cached.cache.block_size, within = place - block * cached.cache.block_size;
    const Element* row_gmem = row < rows ? cached.row(block, within) : cached.head_gmem;
    Vec<Element> chunk;
#pragma unroll
    for (int e = 0; e < Tile::kChunkElems; ++e) {
      chunk[e] = row < rows && col + e < cols ? row_gmem[col + e] : from_float<Element>(0.0f);
    }
    store_vec(reinterpret_cast<Element*>(staged_place(tile, tile_smem, row, col)), chunk);
  }
}

}  // namespace fastattn
