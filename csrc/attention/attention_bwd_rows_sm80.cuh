// What the backward needs of each row before it looks at a key, and what it learns from rows alone:
//   delta_i = dO_i . o_i - dlse_i     (0 for a row that sees nothing)
//   lse_i in units of log2            (+inf for a row that sees nothing: then exp2(s - lse) = 0 without a branch)
//   dsink   = -sum_i exp(sink - lse_i) delta_i
//   dmask   = sum_i dlse_i + exp(sink - lse_i) delta_i    (of a mask that broadcasts over keys)
// o has 16 bits, so delta has no more. That serves dq, dk and dv, which are rounded likewise; the gradients of sinks
// and masks are fp32 sums. While dq is made of dS = P (dP - delta), its rows are therefore summed up: that they should
// be dlse_i + exp(sink - lse_i) delta_i corrects delta, to which the sum adds what delta had lost.
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
  // Of the rows of dS, by another kernel, if not null: (row_sum_parts, rows) with row_sums_part between parts, 64 rows
  // after another with row_sums_tile between.
  const float* row_sums = nullptr;
  int64_t row_sums_part = 0, row_sums_tile = 64;
  int row_sum_parts = 0;
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

constexpr int kDeltaThreads = kRowPadding;

// What the gradients of sinks and masks need of a row: 0 of one that sees nothing.
struct RowTerms {
  float p_sink = 0.0f, delta = 0.0f, dlse = 0.0f;
};

// `row` counts from the sequence's first.
FASTATTN_DEVICE RowTerms row_terms(const AttentionBwdParams& p, const BwdRowStatistics& stats,
                                   const StatisticsRows& rows, int64_t batch, int64_t head, int64_t row) {
  const int64_t source = lse_offset(p, batch, head) + rows.queries.begin + row;
  const float lse = static_cast<const float*>(p.lse)[source];
  RowTerms terms;
  if (lse == -INFINITY) return terms;
  // In base 2 the lse would round once more, which an approximate exponential does not notice and a sum in fp32 does.
  if (p.sinks != nullptr) terms.p_sink = expf(static_cast<const float*>(p.sinks)[head] - lse);
  terms.delta = stats.delta[rows.first + row];
  if (p.dlse != nullptr) terms.dlse = static_cast<const float*>(p.dlse)[source];
  return terms;
}

// Gives delta the digits that `out` had lost, from the rows of dS. A block has the rows of one head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_delta_kernel(const __grid_constant__ AttentionBwdParams p, const BwdRowStatistics stats) {
  const uint32_t head_blocks = static_cast<uint32_t>(stats.padded_rows / kThreads);
  const uint32_t batch_head = blockIdx.x / head_blocks, heads = static_cast<uint32_t>(p.heads);
  const int64_t batch = batch_head / heads, head = batch_head % heads;
  const int64_t row = int64_t{blockIdx.x % head_blocks} * kThreads + threadIdx.x;
  const StatisticsRows rows = statistics_rows(p, stats, batch, head);
  if (row >= rows.queries.end - rows.queries.begin) return;
  const RowTerms terms = row_terms(p, stats, rows, batch, head, row);
  const int64_t target = rows.first + row;
  const float* const parts = stats.row_sums + target / 64 * stats.row_sums_tile + target % 64;
  float sum = 0.0f;
  for (int part = 0; part < stats.row_sum_parts; ++part) sum += parts[part * stats.row_sums_part];
  stats.delta[target] = terms.delta + fmaf(-terms.p_sink, terms.delta, sum - terms.dlse);
}

// Sums of many rows are few, so they may be exact.
constexpr int kSinkWarps = 16;

// One block a head, which adds up its rows in an order of its own: bitwise the same in every run.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    attention_bwd_sinks_kernel(const __grid_constant__ AttentionBwdParams p, const BwdRowStatistics stats) {
  FASTATTN_SHARED(scratch, double[kWarps]);
  const int64_t head = blockIdx.x;
  double sum = 0.0;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const StatisticsRows rows = statistics_rows(p, stats, batch, head);
    const int64_t end = rows.queries.end - rows.queries.begin;
    for (int64_t row = threadIdx.x; row < end; row += 32 * kWarps) {
      const RowTerms terms = row_terms(p, stats, rows, batch, head, row);
      sum -= double{terms.p_sink} * terms.delta;
    }
  }
  sum = block_reduce(sum, Sum{}, scratch);
  if (threadIdx.x == 0) static_cast<float*>(p.dsinks)[head] = static_cast<float>(sum);
}

// A block for each place of a mask that broadcasts over keys: (mask batch, mask head, mask row), the last the fastest.
// Adds up the rows that share it. There are no packed sequences.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    attention_bwd_row_mask_kernel(const __grid_constant__ AttentionBwdParams p, const BwdRowStatistics stats) {
  FASTATTN_SHARED(scratch, double[kWarps]);
  const auto all_batches = static_cast<uint32_t>(p.batch), all_heads = static_cast<uint32_t>(p.heads);
  const auto all_rows = static_cast<uint32_t>(p.seqlen_q);
  const bool per_batch = p.stride_dmask_batch != 0, per_head = p.stride_dmask_head != 0;
  const bool per_row = p.stride_dmask_q != 0;
  const uint32_t mask_heads = per_head ? all_heads : 1, mask_rows = per_row ? all_rows : 1;
  const uint32_t mask_row = blockIdx.x % mask_rows, mask_head = blockIdx.x / mask_rows % mask_heads;
  const uint32_t mask_batch = blockIdx.x / mask_rows / mask_heads;
  const uint32_t rows_shared = per_row ? 1 : all_rows, heads_shared = per_head ? 1 : all_heads;
  const uint32_t sharers = (per_batch ? 1 : all_batches) * heads_shared * rows_shared;
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < sharers; i += 32 * kWarps) {
    const int64_t row = mask_row + i % rows_shared, head = mask_head + i / rows_shared % heads_shared;
    const int64_t batch = mask_batch + i / rows_shared / heads_shared;
    const RowTerms terms = row_terms(p, stats, statistics_rows(p, stats, batch, head), batch, head, row);
    sum += double{terms.dlse} + double{terms.p_sink} * terms.delta;
  }
  sum = block_reduce(sum, Sum{}, scratch);
  if (threadIdx.x == 0) {
    float* dmask = static_cast<float*>(p.dmask) + mask_batch * p.stride_dmask_batch + mask_head * p.stride_dmask_head;
    dmask[mask_row * p.stride_dmask_q] = static_cast<float>(sum);
  }
}

}  // namespace fastattn
