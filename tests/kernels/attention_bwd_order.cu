// The order in which blocks take the key tiles of packed sequences in Hopper's backward, as the kernels read it: place
// i is keys[4 i] of sequence, key head, first key and number of keys.
#include "attention/attention_bwd_order_sm90.cuh"

using namespace fastattn;

constexpr int kBlockK = 128;

__global__ void list_bwd_places_kernel(AttentionBwdArgs args, BwdOrder order, int most, int* places, int* keys) {
  if (threadIdx.x != 0) return;
  const int count = *order.tiles * args.heads_kv * args.parts.count();
  *places = count;
  for (int i = 0; i < count && i < most; ++i) {
    const BwdKeys<kBlockK> at(args, order, atomicAdd(order.next_place, 1));
    keys[4 * i] = at.batch, keys[4 * i + 1] = at.head_kv, keys[4 * i + 2] = at.first, keys[4 * i + 3] = at.count;
  }
}

// `section` key heads lie next to each other. Sequences of cu_seqlens_q and cu_seqlens_k, of which the longest have
// `longest_q` and `longest_k` rows; `workspace` has 2 + 2 batch numbers.
extern "C" const char* attention_bwd_order(const int* cu_seqlens_q, const int* cu_seqlens_k, int batch, int total_q,
                                           int total_k, int longest_q, int longest_k, int heads_kv, int section,
                                           int most, int* workspace, int* places, int* keys, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  AttentionBwdArgs args;
  args.heads_kv = heads_kv;
  args.scores.seqlen_q = longest_q, args.scores.seqlen_k = longest_k;
  args.packed = {{cu_seqlens_q, total_q}, {cu_seqlens_k, total_k}};
  const BwdOrder order = BwdOrder::in(reinterpret_cast<uint8_t*>(workspace), batch, section);
  if (const char* error = launch_kernel(attention_bwd_order_kernel<QueryClass::kCount>, 1, QueryClass::kCount, 0,
                                        stream, order, args.packed, longest_q, longest_k, kBlockK)) {
    return error;
  }
  return launch_kernel(list_bwd_places_kernel, 1, 32, 0, stream, args, order, most, places, keys);
}
