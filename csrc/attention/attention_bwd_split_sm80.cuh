// Where keys are few, several blocks share the queries of a block of keys: each leaves fp32 sums of its part, and
// attention_bwd_dkv_sum_kernel adds them, always in the same order.
// Memory:  a part writes 4 (head_dim + head_dim_v) bytes a key, which are read once.
#pragma once

#include "attention/attention_bwd_sm80.cuh"

namespace fastattn {

// Element (row, col) of a part's sums for a warp's keys becomes factor * acc. `columns` is a multiple of 8.
template <int kRowTiles, int kColTiles>
FASTATTN_DEVICE void store_part(const float (&acc)[kRowTiles][kColTiles][4], float factor, float* gmem, int columns,
                                int rows) {
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);  // or a loop around would keep lane / 4
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + lane / 4;
      if (row >= rows) continue;
      float* dst = gmem + int64_t{row} * columns + lane_column();
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        if (8 * n >= columns) break;
        store_vec(dst + 8 * n, Vec<float, 2>{{factor * acc[m][n][2 * half], factor * acc[m][n][2 * half + 1]}});
      }
    }
  }
}

struct DkvSumArgs {
  BwdParts parts;
  AttentionTensor dk, dv;
  int64_t chunks = 0;  // of eight columns, in one gradient
  int heads_kv = 0, seqlen_k = 0, head_dim = 0, head_dim_v = 0;
  bool dk_is_aligned = false, dv_is_aligned = false;
  PackedRows packed_k;
};

constexpr int kDkvSumThreads = 256;

// A thread has eight columns of a key; blockIdx.y is 0 for dk, 1 for dv.
template <typename Element>
__global__ void __launch_bounds__(kDkvSumThreads)
    attention_bwd_dkv_sum_kernel(const __grid_constant__ DkvSumArgs args) {
  const int64_t chunk = int64_t{blockIdx.x} * kDkvSumThreads + threadIdx.x;
  if (chunk >= args.chunks) return;
  const bool is_dv = blockIdx.y == 1;
  // 64-bit divisions are calls, which registers have to be saved for: two of them, and the rest in 32 bits.
  const int chunks_per_row = args.parts.columns / 8;
  const int64_t key = chunk / chunks_per_row;
  const int col = static_cast<int>(chunk - key * chunks_per_row) * 8;
  const int batch_head = static_cast<int>(key / args.seqlen_k);
  const int row = static_cast<int>(key - int64_t{batch_head} * args.seqlen_k);
  const int cols = (is_dv ? args.head_dim_v : args.head_dim) - col;
  if (cols <= 0) return;
  int64_t first_key = 0;
  if (args.packed_k.cu_seqlens != nullptr) {
    const IndexRange keys = packed_sequence(args.packed_k, batch_head / args.heads_kv, args.seqlen_k);
    if (row >= keys.end - keys.begin) return;
    first_key = keys.begin;
  }

  float sums[8] = {};
  for (int part = 0; part < args.parts.count(); ++part) {
    const float* source = args.parts.sums(is_dv, part) + chunk * 8;
    const Vec<float, 4> low = load_vec<4>(source), high = load_vec<4>(source + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += low[i], sums[4 + i] += high[i];
  }
  Vec<Element> result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result[i] = from_float<Element>(sums[i]);
  const AttentionTensor& tensor = is_dv ? args.dv : args.dk;
  Element* dst = head_gmem<Element>(tensor, batch_head / args.heads_kv, batch_head % args.heads_kv) +
                 (first_key + row) * tensor.stride_row + col;
  if (is_dv ? args.dv_is_aligned : args.dk_is_aligned) {
    store_vec(dst, result);
  } else {
    for (int e = 0; e < min(8, cols); ++e) dst[e] = result[e];
  }
}

}  // namespace fastattn
