// What the backward needs of each row before it looks at a key, and what it learns from rows alone:
//   delta_i = dO_i . o_i - dlse_i     (0 for a row that sees nothing)
//   lse_i in units of log2            (+inf for a row that sees nothing: then exp2(s - lse) = 0 without a branch)
//   dsink   = -sum_i exp(sink - lse_i) delta_i
// Memory:  each row of out and dout is read once; two floats a row are written. Rows are padded to kRowPadding, and the
//          padding looks like rows that see nothing, so that the kernels behind need no bounds check on rows.
#pragma once

#include "attention/attention_bwd_sm80.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace fastattn {

// (batch * heads, padded_rows) each, or of packed sequences (heads, packed_rows): see packed_statistics_row.
struct BwdRowStatistics {
  float* lse_log2 = nullptr;
  float* delta = nullptr;
  int64_t padded_rows = 0;  // of the longest sequence
  int64_t packed_rows = 0;
  // Also written, with zeros, where not null: dq_columns floats and a turn counter a warpgroup and 64 rows; see
  // attention_bwd_dq_sum_sm90.cuh.
  float* dq_sum = nullptr;
  int* turns = nullptr;
  int dq_columns = 0;
};

// Where the rows of (batch, head) lie: in the tensors, and their statistics.
struct StatisticsRows {
  IndexRange queries;
  int64_t first = 0;
};

FASTATTN_DEVICE StatisticsRows statistics_rows(const AttentionParams& p, const BwdRowStatistics& stats, int64_t batch,
                                               int64_t head) {
  if (!is_packed(p)) return {{0, p.seqlen_q}, (batch * p.heads + head) * stats.padded_rows};
  const IndexRange queries = packed_sequence(p.packed_q, batch, p.seqlen_q);
  return {queries, head * stats.packed_rows + packed_statistics_row(batch, queries.begin)};
}

constexpr int kRowStatisticsThreads = 128;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerBlock = kRowStatisticsThreads / kLanesPerRow;

// out_i . dout_i over the lanes of a row; every lane gets the result. Vectors of kVec elements, which divide head_dim.
template <typename Element, int kVec>
FASTATTN_DEVICE float row_dot(const Element* a, const Element* b, int head_dim, int lane) {
  float sum = 0.0f;
  for (int column = lane * kVec; column < head_dim; column += kLanesPerRow * kVec) {
    const Vec<Element, kVec> x = load_vec<kVec>(a + column), y = load_vec<kVec>(b + column);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += to_float(x[i]) * to_float(y[i]);
  }
  return warp_reduce<kLanesPerRow>(sum, Sum{});
}

// kAligned: rows of out and dout start at multiples of 16 bytes and hold a multiple of 8 elements.
template <typename Element, bool kAligned>
__global__ void __launch_bounds__(kRowStatisticsThreads)
    attention_bwd_rows_kernel(const __grid_constant__ AttentionBwdParams p, const BwdRowStatistics stats) {
  // 64-bit divisions are calls, which registers have to be saved for. No block has rows of two heads.
  const uint32_t head_blocks = static_cast<uint32_t>(stats.padded_rows / kRowsPerBlock);
  const uint32_t batch_head = blockIdx.x / head_blocks, heads = static_cast<uint32_t>(p.heads);
  const int64_t batch = batch_head / heads, head = batch_head % heads;
  const int row_in_block = static_cast<int>(threadIdx.x) / kLanesPerRow;
  const int64_t row = int64_t{blockIdx.x % head_blocks} * kRowsPerBlock + row_in_block;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerRow;

  const StatisticsRows rows = statistics_rows(p, stats, batch, head);
  const int64_t seqlen_q = rows.queries.end - rows.queries.begin;
  // Either all rows of a block are past a sequence's padding or none is: nobody is missed in the sum below.
  if (is_packed(p) && row >= (seqlen_q + kRowPadding - 1) / kRowPadding * kRowPadding) return;

  const bool exists = row < seqlen_q;
  const int64_t target = rows.first + row;
  const auto row_of = [&](const AttentionTensor& tensor) {
    return static_cast<const Element*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head +
           (rows.queries.begin + row) * tensor.stride_row;
  };
  // All lanes of a warp meet in the sum, those of rows that do not exist included.
  const float dot = row_dot<Element, kAligned ? 8 : 1>(row_of(p.dout), row_of(p.out),
                                                       exists ? static_cast<int>(p.head_dim_v) : 0, lane);
  if (stats.dq_sum != nullptr) {
    auto* zeros = reinterpret_cast<float4*>(stats.dq_sum + target * stats.dq_columns);
    for (int i = lane; i < stats.dq_columns / 4; i += kLanesPerRow) zeros[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (lane != 0) return;
  if (stats.turns != nullptr && target % 64 < 2) stats.turns[target / 64 * 2 + target % 64] = 0;
  const int64_t source = lse_offset(p, batch, head) + rows.queries.begin + row;
  const float lse = exists ? static_cast<const float*>(p.lse)[source] : -INFINITY;
  // Not lse > -inf, which would hide a NaN.
  const bool sees_nothing = lse == -INFINITY;
  const float dlse = exists && p.dlse != nullptr ? static_cast<const float*>(p.dlse)[source] : 0.0f;
  stats.lse_log2[target] = sees_nothing ? INFINITY : lse * kLog2E;
  stats.delta[target] = sees_nothing ? 0.0f : dot - dlse;
}

constexpr int kSinkWarps = 16;

// One block a head, which adds up its rows in an order of its own: bitwise the same in every run.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    attention_bwd_sinks_kernel(const __grid_constant__ AttentionBwdParams p, const BwdRowStatistics stats) {
  FASTATTN_SHARED(scratch, float[kWarps]);
  const int64_t head = blockIdx.x;
  const float sink_log2 = static_cast<const float*>(p.sinks)[head] * kLog2E;
  float sum = 0.0f;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const StatisticsRows rows = statistics_rows(p, stats, batch, head);
    const int64_t end = rows.first + rows.queries.end - rows.queries.begin;
    for (int64_t row = rows.first + threadIdx.x; row < end; row += 32 * kWarps) {
      sum -= ex2_approx(sink_log2 - stats.lse_log2[row]) * stats.delta[row];
    }
  }
  sum = block_reduce(sum, Sum{}, scratch);
  if (threadIdx.x == 0) static_cast<float*>(p.dsinks)[head] = sum;
}

}  // namespace fastattn
