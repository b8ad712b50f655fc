// What persistent blocks get of the attention forward's row tiles: work[block] is the number of keys that the block's
// row tiles of a causal triangle visit, visits[batch * head * row tile] how often each was taken.
#include "attention/attention_fwd_order.cuh"
#include "common/launch.cuh"

using namespace fastattn;

__global__ void attention_order_kernel(FwdOrder order, int block_q, int* work, int* visits) {
  if (threadIdx.x != 0) return;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int places = order.batch * order.tile_heads * order.row_tiles;
  for (int round = 0; round * blocks < places; ++round) {
    const int place = place_of_round(round, block, blocks);
    if (place >= places) continue;
    const FwdWork at = order.work(place, 0, true);
    work[block] += (at.row_tile + 1) * block_q;
    ++visits[(at.batch * order.tile_heads + at.tile_head) * order.row_tiles + at.row_tile];
  }
}

// `bytes_per_head` of k and v; all heads have their own.
extern "C" const char* attention_order(int batch, int heads, int row_tiles, int block_q, int bytes_per_head, int blocks,
                                       int* work, int* visits, void* stream) {
  const auto section = static_cast<int>(kv_heads_per_section(int64_t{batch} * heads, bytes_per_head));
  return launch_kernel(attention_order_kernel, static_cast<unsigned>(blocks), 32, 0, static_cast<cudaStream_t>(stream),
                       FwdOrder{batch, heads, row_tiles, section}, block_q, work, visits);
}
