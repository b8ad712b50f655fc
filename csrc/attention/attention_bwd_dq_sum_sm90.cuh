// dq while it is being added up: in fp32, 64 rows at a time, in the order of the accumulators of the warpgroups that
// add to it. Columns that a warpgroup holds lie together, so that it leaves by one bulk copy that adds; neither the
// copy nor the warpgroup permutes anything. The kernel below does it once, when all is added up.
#pragma once

#include "attention/attention_bwd_order_sm90.cuh"

namespace fastattn {

struct DqSum {
  static constexpr int kRows = 64;
  // Where rows of dS are summed up, in so many parts, they lie behind the columns of dq: as many columns more.
  static constexpr int kRowSumParts = 4;

  // (batch * heads, padded_rows / 64, columns / 8, 128 threads, 4), zero before the first addition; behind each 64 rows
  // maybe (kRowSumParts, 64) row sums.
  float* sum = nullptr;
  // (batch * heads, padded_rows / 64, 2 warpgroups): how many blocks of keys have added; null where any order will do.
  int* turns = nullptr;
  int64_t padded_rows = 0;
  int columns = 0;     // with those of row sums
  int dq_columns = 0;  // a multiple of 8

  FASTATTN_HOST_DEVICE int64_t row_tile(int64_t batch_head, int64_t row) const {
    return (batch_head * padded_rows + row) / kRows;
  }
  // Of `column`, a multiple of 8, and those behind it.
  FASTATTN_DEVICE float* piece(int64_t row_tile, int column) const {
    return sum + (row_tile * columns + column) * kRows;
  }
  // Of one part and those behind it.
  FASTATTN_DEVICE float* row_sums(int64_t row_tile, int part) const { return piece(row_tile, dq_columns + part); }
  FASTATTN_DEVICE int* turn(int64_t row_tile, int group) const { return turns + row_tile * 2 + group; }
};

struct AttentionBwdSm90Args {
  AttentionBwdArgs bwd;
  DqSum dq;
  BwdOrder order;  // of packed sequences
};

// Makes args those of batch entry `batch` alone. Sums of packed sequences lie where their statistics do: heads take the
// place of (batch, head).
FASTATTN_DEVICE void narrow_to_entry(AttentionBwdSm90Args& args, int batch) {
  const int64_t first_query = packed_sequence(args.bwd.packed.q, batch, args.bwd.scores.seqlen_q).begin;
  const int64_t row = packed_statistics_row(batch, first_query);
  args.dq.sum += row * args.dq.columns;
  if (args.dq.turns != nullptr) args.dq.turns += row / DqSum::kRows * 2;
  narrow_to_entry(args.bwd, batch);
}

constexpr int kDqFinishThreads = 256;

struct DqFinishArgs {
  DqSum dq;
  AttentionTensor out;
  PackedRows packed_q;
  int64_t padded_rows = 0;  // of the longest sequence
  int heads = 0, seqlen_q = 0, head_dim = 0;
  int64_t items = 0;
  float scale = 0.0f;
  bool is_aligned = false;
};

// dq = scale * sum. A thread has eight columns of two rows, 64 bytes that lie together; neighbours have the next
// columns.
template <typename Element>
__global__ void __launch_bounds__(kDqFinishThreads)
    attention_bwd_dq_finish_kernel(const __grid_constant__ DqFinishArgs args) {
  const int64_t item = int64_t{blockIdx.x} * kDqFinishThreads + threadIdx.x;
  if (item >= args.items) return;
  const int chunks = args.dq.dq_columns / 8, col = static_cast<int>(item % chunks) * 8;
  const int64_t pair = item / chunks;  // of rows: eight pairs to 16 rows
  const int64_t padded_row = pair / 8 * 16 + pair % 8;
  const int64_t batch_head = padded_row / args.padded_rows;
  const int row = static_cast<int>(padded_row % args.padded_rows);
  const int batch = static_cast<int>(batch_head / args.heads), head = static_cast<int>(batch_head % args.heads);
  IndexRange queries = {0, args.seqlen_q};
  int64_t row_tile = args.dq.row_tile(batch_head, row);
  if (args.packed_q.cu_seqlens != nullptr) {
    queries = packed_sequence(args.packed_q, batch, args.seqlen_q);
    row_tile = args.dq.row_tile(head, packed_statistics_row(batch, queries.begin) + row);
  }
  const int seqlen_q = static_cast<int>(queries.end - queries.begin);
  if (row >= seqlen_q || col >= args.head_dim) return;

  // Rows g and g + 8 of eight columns lie together: of lanes 4 g to 4 g + 3 of a warp.
  const int first_lane = row % DqSum::kRows / 16 * 32 + row % 8 * 4;
  const float4* source = reinterpret_cast<const float4*>(args.dq.piece(row_tile, col)) + first_lane;
  Vec<Element> upper, lower;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 quad = source[t];
    upper[2 * t] = from_float<Element>(args.scale * quad.x),
              upper[2 * t + 1] = from_float<Element>(args.scale * quad.y);
    lower[2 * t] = from_float<Element>(args.scale * quad.z),
              lower[2 * t + 1] = from_float<Element>(args.scale * quad.w);
  }
  Element* out = head_gmem<Element>(args.out, batch, head) + (queries.begin + row) * args.out.stride_row + col;
  const auto store = [&](Element* dst, const Vec<Element>& chunk) {
    if (args.is_aligned) {
      store_vec(dst, chunk);
    } else {
      for (int e = 0; e < min(8, args.head_dim - col); ++e) dst[e] = chunk[e];
    }
  };
  store(out, upper);
  if (row + 8 < seqlen_q) store(out + 8 * args.out.stride_row, lower);
}

}  // namespace fastattn
