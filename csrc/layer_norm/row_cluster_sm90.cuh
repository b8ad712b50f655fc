// How the blocks of a cluster share a row, and tell each other their sums over it.
// Work:    a row's chunks are divided evenly; block `rank` has the rank-th share.
// Memory:  each block has an inbox in shared memory with a place for every rank. Sums are pushed there by st.async,
//          whose bytes complete a phase of the receiver's mbarrier: one trip from block to block, where a barrier of
//          the cluster and loads would be three.
// Numbers: every block adds up the same values in the order of ranks: the same bits in all of them, on every run.
//
// The inbox has two halves, used in turns. A block sends again to a half only after it has received all of the other
// half, so after everybody has sent that, which they do after reading the half that is now overwritten. No block exits
// before it has received what the others send it last.
#pragma once

#include "common/ptx_cluster.cuh"
#include "layer_norm/layer_norm.cuh"

namespace fastattn {

constexpr int kMaxRowBlocks = 8;  // the largest cluster that every card with clusters runs

// The share of this block: a whole number of chunks, except for the last.
template <int kChunk>
FASTATTN_DEVICE Columns cluster_columns(int64_t cols, int chunks_per_block, uint32_t rank) {
  const int64_t begin = int64_t{rank} * chunks_per_block * kChunk, end = begin + chunks_per_block * kChunk;
  return {static_cast<int>(begin < cols ? begin : cols), static_cast<int>(end < cols ? end : cols)};
}

template <int kSums>
using RankSums = float[kMaxRowBlocks][kSums];

template <int kSums>
struct ClusterInbox {
  alignas(16) RankSums<kSums> sums[2];
  uint64_t arrived[2];
};

// The blocks' conversation about kSums (2 or 4) values a row. All threads of all blocks call each function together, in
// the order open, connect, exchange, exchange, ...; between open and the first exchange the block has a __syncthreads.
template <int kSums>
class ClusterExchange {
 public:
  FASTATTN_DEVICE explicit ClusterExchange(ClusterInbox<kSums>& inbox) : inbox_(inbox) {}

  // What the block does until it connects overlaps with the start of the others.
  FASTATTN_DEVICE void open() {
    if (threadIdx.x == 0) {
      mbarrier_init(&inbox_.arrived[0], 1);
      mbarrier_init(&inbox_.arrived[1], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  FASTATTN_DEVICE void connect() { cluster_wait(); }

  // Gives every block the values of all, by rank. They stay until the exchange after the next.
  FASTATTN_DEVICE const RankSums<kSums>& exchange(const float (&values)[kSums]) {
    const uint32_t half = turn_ % 2, parity = turn_ / 2 % 2;
    ++turn_;
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&inbox_.arrived[half], cluster_blocks() * sizeof values);
    if (threadIdx.x < cluster_blocks()) {
      uint32_t bits[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) bits[i] = static_cast<uint32_t>(__float_as_int(values[i]));
      store_async(cluster_address(smem_address(inbox_.sums[half][cluster_rank()]), threadIdx.x), bits,
                  cluster_address(smem_address(&inbox_.arrived[half]), threadIdx.x));
    }
    mbarrier_wait_cluster(&inbox_.arrived[half], static_cast<int>(parity));
    return inbox_.sums[half];
  }

  FASTATTN_DEVICE int blocks() const { return static_cast<int>(cluster_blocks()); }
  FASTATTN_DEVICE uint32_t rank() const { return cluster_rank(); }

 private:
  ClusterInbox<kSums>& inbox_;
  uint32_t turn_ = 0;
};

}  // namespace fastattn
