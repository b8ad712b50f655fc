// INT8 matrix product for up to 16 rows of a: the time is that of reading b once.
// Work:    one block per 8 kColumnTiles columns; its 8 warps share out k and add up their int32 sums in shared memory.
// Memory:  b goes from global memory to the registers of mma without a detour: a lane loads 16 neighbouring bytes of
//          its column, four lanes 64. mma wants other bytes of k in those registers, but the order of k does not matter
//          as long as a's is the same, and a is loaded alike. A warp has 128 or 256 bytes of each column in flight.
//          int8_linear of up to 4 rows quantises them in every block, into shared memory: that costs less than a
//          launch.
// Numbers: as in int8_matmul_sm80.cuh; the sum over warps is of integers, so its order does not matter either.
#pragma once

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "int8_matmul/int8_epilogue.cuh"
#include "int8_matmul/int8_matmul_plan.h"
#include "int8_matmul/quantize_int8.cuh"

namespace fastattn {

template <int kColumnTiles_>
struct Int8FewRowsShape {
  static constexpr int kMaxRows = 16;
  static constexpr int kColumnTiles = kColumnTiles_, kColumns = 8 * kColumnTiles;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kLaneBytes = 16, kLoadDepth = 4 * kLaneBytes;  // of k: of a lane, of one load
  static constexpr int kLoads = kColumnTiles < 4 ? 4 : 2, kWarpDepth = kLoads * kLoadDepth;
  static constexpr int kSmemBytes = kWarps * kMaxRows * kColumns * 4;
};

// 16 bytes of a row from k on, of which those before k_end exist.
template <bool kWhole>
FASTATTN_DEVICE Vec<uint32_t, 4> load_int8_chunk(const int8_t* row, int k, int k_end) {
  Vec<uint32_t, 4> chunk = {};
  if (kWhole || k + 16 <= k_end) {
    chunk = load_vec<4>(reinterpret_cast<const uint32_t*>(row + k));
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (k + i < k_end) chunk[i / 4] |= uint32_t{static_cast<uint8_t>(row[k + i])} << (i % 4 * 8);
    }
  }
  return chunk;
}

// Adds the products of kWarpDepth bytes of k to a warp's sums. a_rows: row g, and row g + 8 if there are more than 8.
template <typename Shape, bool kWhole>
FASTATTN_DEVICE void multiply_few_rows(int32_t (&sums)[Shape::kColumnTiles][4], const int8_t* const (&a_rows)[2],
                                       const int8_t* const (&b_columns)[Shape::kColumnTiles], bool more_than_8_rows,
                                       int k, int k_end) {
  Vec<uint32_t, 4> a[2][Shape::kLoads], b[Shape::kColumnTiles][Shape::kLoads];
#pragma unroll
  for (int load = 0; load < Shape::kLoads; ++load) {
    const int k_load = k + load * Shape::kLoadDepth;
#pragma unroll
    for (int j = 0; j < Shape::kColumnTiles; ++j) b[j][load] = load_int8_chunk<kWhole>(b_columns[j], k_load, k_end);
  }
#pragma unroll
  for (int load = 0; load < Shape::kLoads; ++load) {
    const int k_load = k + load * Shape::kLoadDepth;
    a[0][load] = load_int8_chunk<kWhole>(a_rows[0], k_load, k_end);
    a[1][load] = more_than_8_rows ? load_int8_chunk<kWhole>(a_rows[1], k_load, k_end) : Vec<uint32_t, 4>{};
  }
#pragma unroll
  for (int load = 0; load < Shape::kLoads; ++load) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a_tile[4] = {a[0][load][2 * half], a[1][load][2 * half], a[0][load][2 * half + 1],
                                  a[1][load][2 * half + 1]};
#pragma unroll
      for (int j = 0; j < Shape::kColumnTiles; ++j) {
        const uint32_t b_tile[2] = {b[j][load][2 * half], b[j][load][2 * half + 1]};
        mma_m16n8k32_s8(sums[j], a_tile, b_tile);
      }
    }
  }
}

// What a block does. `a` and `a_scale` may be in shared memory; `partial` is, [warp][row][column].
template <typename Shape, typename Out>
FASTATTN_DEVICE void few_rows_block(const Int8KernelParams& p, const int8_t* a, int64_t stride_a, const float* a_scale,
                                    int32_t* partial) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_column = int64_t{blockIdx.x} * Shape::kColumns;

  // Rows and columns past the last are read as the last: their sums are not stored.
  const int last_row = static_cast<int>(p.rows) - 1;
  const int8_t* const a_rows[2] = {a + min(g, last_row) * stride_a + t * Shape::kLaneBytes,
                                   a + min(g + 8, last_row) * stride_a + t * Shape::kLaneBytes};
  const int8_t* b_columns[Shape::kColumnTiles];
#pragma unroll
  for (int j = 0; j < Shape::kColumnTiles; ++j) {
    b_columns[j] = p.b + min(first_column + 8 * j + g, p.columns - 1) * p.stride_b + t * Shape::kLaneBytes;
  }

  int32_t sums[Shape::kColumnTiles][4] = {};
  const int lane_end = p.depth - t * Shape::kLaneBytes;
  for (int k = warp * Shape::kWarpDepth; k < p.depth; k += Shape::kWarps * Shape::kWarpDepth) {
    if (k + Shape::kWarpDepth <= p.depth) {
      multiply_few_rows<Shape, true>(sums, a_rows, b_columns, p.rows > 8, k, lane_end);
    } else {
      multiply_few_rows<Shape, false>(sums, a_rows, b_columns, p.rows > 8, k, lane_end);
    }
  }

#pragma unroll
  for (int j = 0; j < Shape::kColumnTiles; ++j) {
    int32_t* target = partial + (warp * Shape::kMaxRows + g) * Shape::kColumns + 8 * j + 2 * t;
    *reinterpret_cast<int2*>(target) = make_int2(sums[j][0], sums[j][1]);
    *reinterpret_cast<int2*>(target + 8 * Shape::kColumns) = make_int2(sums[j][2], sums[j][3]);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < (last_row + 1) * Shape::kColumns; i += Shape::kThreads) {
    const int row = i / Shape::kColumns;
    const int64_t column = first_column + i % Shape::kColumns;
    int sum[1] = {0};
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) sum[0] += partial[w * Shape::kMaxRows * Shape::kColumns + i];
    const ColumnConstants<1> constants(p, column);
    finish_columns(p, sum, a_scale[row], constants, static_cast<Out*>(p.out) + row * p.stride_out + column,
                   p.columns - column);
  }
}

template <typename Shape, typename Out>
__global__ void __launch_bounds__(Shape::kThreads)
    int8_matmul_few_rows_kernel(const __grid_constant__ Int8KernelParams p) {
  FASTATTN_DYNAMIC_SMEM(smem);
  few_rows_block<Shape, Out>(p, p.a, p.stride_a, p.a_scale, reinterpret_cast<int32_t*>(smem));
}

// `input` has p's rows and depth; its q and scale, and p's a and a_scale, are not used. Rows of q stand 64 bytes beyond
// a multiple of 128 apart, so that the two that a phase of 16-byte loads reads lie in different banks.
constexpr int int8_fused_stride(int depth) { return (depth + 127) / 128 * 128 + 64; }
// What rows of q take at most.
constexpr size_t kInt8MaxFusedBytes = kInt8MaxFusedElems + kInt8MaxFusedRows * (127 + 64);

template <typename Shape, typename Element>
__global__ void __launch_bounds__(Shape::kThreads)
    int8_linear_few_rows_kernel(const __grid_constant__ Int8KernelParams p,
                                const __grid_constant__ QuantizeInt8Params input) {
  using Traits = QuantizeInt8Traits<Element, Shape::kWarps, 2>;
  FASTATTN_DYNAMIC_SMEM(smem);
  FASTATTN_SHARED(scratch, int[Shape::kWarps]);
  FASTATTN_SHARED(scale, float[kInt8MaxFusedRows]);
  int8_t* const q = reinterpret_cast<int8_t*>(smem) + Shape::kSmemBytes;
  const int stride = int8_fused_stride(p.depth), thread = static_cast<int>(threadIdx.x);
  for (int row = 0; row < static_cast<int>(p.rows); ++row) {
    const QuantizedRow<Element, Traits::kWidth> io(input, row, q + row * stride);
    const float row_scale = quantize_int8_row<Traits>(io, thread, scratch);
    if (thread == 0) scale[row] = row_scale;
  }
  __syncthreads();
  few_rows_block<Shape, Element>(p, q, stride, scale, reinterpret_cast<int32_t*>(smem));
}

}  // namespace fastattn
