// Joins the results that attention_fwd_kernel found for parts of the keys:
//   lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s.
#pragma once

#include "attention/attention_fwd_sm80.cuh"
#include "common/launch.cuh"

namespace fastattn {

constexpr int kMaxSplits = 128;
constexpr int kCombineWarps = 4;

// One warp a row. Reads every partial result once, so memory is its limit.
template <typename Element>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_splits_kernel(const __grid_constant__ AttentionFwdArgs args) {
  FASTATTN_SHARED(shares, float[kCombineWarps][kMaxSplits]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int seqlen_q = args.scores.seqlen_q;
  const int64_t rows = int64_t{args.batch} * args.heads * seqlen_q;
  const int64_t row = int64_t{blockIdx.x} * kCombineWarps + warp;
  if (row >= rows) return;
  const int64_t batch_head = row / seqlen_q, batch = batch_head / args.heads, head = batch_head % args.heads;
  int64_t query = row % seqlen_q, lse_row = row;
  if (is_packed(args.packed)) {
    const IndexRange queries = packed_sequence(args.packed.q, batch, seqlen_q);
    query += queries.begin;
    if (query >= queries.end) return;
    lse_row = head * args.packed.q.total + query;
  }

  float largest = -INFINITY;
  for (int split = lane; split < args.splits; split += 32) {
    largest = fmaxf(largest, args.partial_lse[split * rows + row]);
  }
  largest = warp_reduce(largest, Max());
  const float reference = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  for (int split = lane; split < args.splits; split += 32) {
    const float share = ex2_approx(args.partial_lse[split * rows + row] - reference);
    shares[warp][split] = share;
    sum += share;
  }
  sum = warp_reduce(sum, ::fastattn::Sum());
  const float normaliser = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (lane == 0) args.lse[lse_row] = (reference + log2f(sum)) * kLn2;  // as in softmax.cuh
  __syncwarp();

  Element* out_gmem = static_cast<Element*>(args.out.data) + batch * args.out.stride_batch +
                      head * args.out.stride_head + query * args.out.stride_row;
  for (int col = 2 * lane; col < args.head_dim_v; col += 64) {
    float2 total = {0.0f, 0.0f};
    for (int split = 0; split < args.splits; ++split) {
      const float* part = args.partial_out + (split * rows + row) * args.partial_stride + col;
      const Vec<float, 2> pair = load_vec<2>(part);
      total.x = fmaf(shares[warp][split], pair[0], total.x);
      total.y = fmaf(shares[warp][split], pair[1], total.y);
    }
    out_gmem[col] = from_float<Element>(total.x * normaliser);
    if (col + 1 < args.head_dim_v) out_gmem[col + 1] = from_float<Element>(total.y * normaliser);
  }
}

template <typename Element>
const char* launch_combine_splits(const AttentionFwdArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.batch} * args.heads * args.scores.seqlen_q;
  const auto blocks = static_cast<unsigned>((rows + kCombineWarps - 1) / kCombineWarps);
  return launch_kernel(combine_splits_kernel<Element>, blocks, 32 * kCombineWarps, 0, stream, args);
}

}  // namespace fastattn
