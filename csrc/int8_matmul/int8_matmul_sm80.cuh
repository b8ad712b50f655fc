// INT8 matrix product on tensor cores:  out = activation((a b^T) * a_scale * b_scale + bias), a (M, K), b (N, K).
// Work:    one block per tile of out (and part of k); each warp owns a kWarpRows x kWarpColumns piece of it. Blocks are
//          numbered so that those which run together share rows of a and of b in L2.
// Memory:  both operands have k contiguous, as mma wants them. A ring of kStages tiles in shared memory, filled by
//          cp.async kStages - 1 steps ahead, swizzled so that neither the copies nor ldmatrix meet a bank twice;
//          fragments are loaded one mma step ahead. Sums go through shared memory once, to be stored in full lines.
// Numbers: int32 sums are exact; what lies past K is zero. int8_epilogue.cuh has the rest.
// Source:  the multistage structure is that of CUTLASS's sm_80 kernels, described in Thakkar et al., "CUTLASS" (2023).
#pragma once

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "int8_matmul/int8_epilogue.cuh"

namespace fastattn {

template <int kRows_, int kColumns_, int kDepth_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct Int8TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kDepth = kDepth_;  // bytes of k in shared memory, of one stage
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kStages = kStages_;

  static constexpr int kWarpsAlongRows = kRows / kWarpRows, kWarpsAlongColumns = kColumns / kWarpColumns;
  static constexpr int kWarps = kWarpsAlongRows * kWarpsAlongColumns, kThreads = 32 * kWarps;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;  // mma tiles of a warp
  static constexpr int kMmaDepth = 32, kSteps = kDepth / kMmaDepth;
  static constexpr int kChunks = kDepth / 16;
  static constexpr int kABytes = kRows * kDepth, kStageBytes = (kRows + kColumns) * kDepth;

  // The sums of a warp pass through shared memory kStagingRows at a time. The pitch, 8 words more than a multiple of
  // 32, spreads the int2 stores of four rows over all banks.
  static constexpr int kStagingRows = kWarpRows < 32 ? kWarpRows : 32, kStagingPitch = kWarpColumns + 8;
  static constexpr int kStagingElems = kStagingRows * kStagingPitch;
  static constexpr int kStagingBytes = kWarps * kStagingElems * 4;
  static constexpr int kSmemBytes = kStages * kStageBytes > kStagingBytes ? kStages * kStageBytes : kStagingBytes;

  static_assert(kDepth == 64 || kDepth == 128, "the swizzle is made for these");
  static_assert(kMmaColumns % 2 == 0, "one ldmatrix brings two mma tiles of b");
  static_assert(kRows * kChunks % kThreads == 0 && kColumns * kChunks % kThreads == 0, "copies in full passes");
  static_assert(kWarpColumns % 32 == 0, "the staging pitch");
  static_assert(kStages >= 2 && kSteps >= 2, "fragments are loaded a step ahead");
};

// ---- shared memory

// Byte offset of a row's 16-byte chunk in a tile with rows of kDepth bytes. Eight neighbouring rows have their chunk c
// in different groups of four banks: a line of 128 bytes holds one row or two.
template <int kDepth>
FASTATTN_DEVICE constexpr uint32_t int8_tile_offset(int row, int chunk) {
  constexpr int kChunks = kDepth / 16, kRowsPerLine = 128 / kDepth;
  return static_cast<uint32_t>(row * kDepth + ((chunk ^ (row / kRowsPerLine % kChunks)) * 16));
}

// An ldmatrix phase reads one chunk of 8 neighbouring rows: their 16-byte places in the 128 bytes of all banks differ.
template <int kDepth>
constexpr bool int8_tile_has_no_bank_conflicts() {
  for (int chunk = 0; chunk < kDepth / 16; ++chunk) {
    for (int first_row = 0; first_row < 16; first_row += 8) {
      unsigned places = 0;
      for (int row = 0; row < 8; ++row) places |= 1u << (int8_tile_offset<kDepth>(first_row + row, chunk) / 16 % 8);
      if (places != 0xFFu) return false;
    }
  }
  return true;
}
static_assert(int8_tile_has_no_bank_conflicts<64>() && int8_tile_has_no_bank_conflicts<128>());

// Starts copies of kTileRows rows, k to k + kDepth. `source` is the first of the tile's rows, of which `rows` exist;
// what is past them or past k_end becomes zero.
template <typename Tile, int kTileRows>
FASTATTN_DEVICE void copy_int8_tile(uint32_t tile_smem, const int8_t* source, int64_t stride, int rows, int k,
                                    int k_end) {
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / Tile::kChunks;
  const int k_chunk = k + 16 * chunk;
  const int valid_bytes = min(max(k_end - k_chunk, 0), 16);
  constexpr int kRowsPerPass = Tile::kThreads / Tile::kChunks;
#pragma unroll
  for (int pass = 0; pass < kTileRows / kRowsPerPass; ++pass) {
    const int row = first_row + pass * kRowsPerPass;
    const bool reads = row < rows && valid_bytes > 0;
    cp_async_zero_fill<16>(tile_smem + int8_tile_offset<Tile::kDepth>(row, chunk),
                           reads ? source + row * stride + k_chunk : source, reads ? valid_bytes : 0);
  }
}

// ---- fragments of one mma step

template <typename Tile>
struct Int8Fragments {
  uint32_t a[Tile::kMmaRows][4];
  uint32_t b[Tile::kMmaColumns / 2][4];  // two neighbouring mma tiles: registers 0, 1 and 2, 3

  // `a_smem` and `b_smem`: this lane's row of the warp's first matrices, in step 0.
  FASTATTN_DEVICE void load(uint32_t a_smem, uint32_t b_smem, int step) {
    // A step is two chunks, and bit 0 of the chunk is the lane's: the swizzle's XOR lets the step be XORed in.
    const uint32_t step_bits = static_cast<uint32_t>(step) * Tile::kMmaDepth;
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i) ldmatrix(a[i], (a_smem ^ step_bits) + i * 16 * Tile::kDepth);
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns / 2; ++j) ldmatrix(b[j], (b_smem ^ step_bits) + j * 16 * Tile::kDepth);
  }

  FASTATTN_DEVICE void multiply(int32_t (&sums)[Tile::kMmaRows][Tile::kMmaColumns][4]) const {
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j) {
        const uint32_t b_tile[2] = {b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]};
        mma_m16n8k32_s8(sums[i][j], a[i], b_tile);
      }
    }
  }
};

// ---- which tile a block computes

struct Int8TileIndex {
  int64_t row = 0, column = 0;  // of the tile's first element
};

// Blocks go down kGroup tiles of rows before the next column: the blocks of a wave then cover a patch of out that is
// about square, and read the fewest different rows of a and b. There are fewer than 2^31 tiles: 32 bits divide faster.
template <typename Tile>
FASTATTN_DEVICE Int8TileIndex int8_tile_of_block(unsigned block, int64_t rows, int64_t columns) {
  constexpr unsigned kGroup = 8;
  const unsigned row_tiles = static_cast<unsigned>((rows + Tile::kRows - 1) / Tile::kRows);
  const unsigned column_tiles = static_cast<unsigned>((columns + Tile::kColumns - 1) / Tile::kColumns);
  const unsigned group_tiles = min(kGroup, row_tiles) * column_tiles;
  const unsigned group = block / group_tiles, within = block % group_tiles;
  const unsigned first = group * kGroup, group_rows = min(row_tiles - first, kGroup);
  return {int64_t{first + within % group_rows} * Tile::kRows, int64_t{within / group_rows} * Tile::kColumns};
}

// ---- epilogue

// Stages a warp's sums and stores them. (row, column): the warp's first element in out. `staging` is the warp's own.
template <typename Tile, typename Out>
FASTATTN_DEVICE void write_int8_tile(const Int8KernelParams& p,
                                     const int32_t (&sums)[Tile::kMmaRows][Tile::kMmaColumns][4], int64_t row,
                                     int64_t column, int32_t* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  constexpr int kPitch = Tile::kStagingPitch;
#pragma unroll
  for (int first = 0; first < Tile::kWarpRows; first += Tile::kStagingRows) {
    if (first > 0) __syncwarp();  // the rows before have been read
#pragma unroll
    for (int i = 0; i < Tile::kStagingRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j) {
        const int32_t (&d)[4] = sums[first / 16 + i][j];
        int32_t* target = staging + (16 * i + g) * kPitch + 8 * j + 2 * t;
        *reinterpret_cast<int2*>(target) = make_int2(d[0], d[1]);
        *reinterpret_cast<int2*>(target + 8 * kPitch) = make_int2(d[2], d[3]);
      }
    }
    __syncwarp();
    store_staged_sums<Out, Tile::kStagingRows, Tile::kWarpColumns, kPitch>(p, staging, row + first, column);
  }
}

// ---- kernel. grid = (tiles, splits)

template <typename Tile, typename Out>
__global__ void __launch_bounds__(Tile::kThreads) int8_matmul_kernel(const __grid_constant__ Int8KernelParams p) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = warp / Tile::kWarpsAlongColumns * Tile::kWarpRows;
  const int warp_column = warp % Tile::kWarpsAlongColumns * Tile::kWarpColumns;
  const Int8TileIndex tile = int8_tile_of_block<Tile>(blockIdx.x, p.rows, p.columns);
  const int rows = static_cast<int>(min(p.rows - tile.row, static_cast<int64_t>(Tile::kRows)));
  const int columns = static_cast<int>(min(p.columns - tile.column, static_cast<int64_t>(Tile::kColumns)));
  const int8_t* a = p.a + tile.row * p.stride_a;
  const int8_t* b = p.b + tile.column * p.stride_b;
  const int k_begin = static_cast<int>(blockIdx.y) * p.depth_per_split;
  const int k_end = min(k_begin + p.depth_per_split, p.depth);
  const int k_tiles = max(k_end - k_begin + Tile::kDepth - 1, 0) / Tile::kDepth;

  const uint32_t stages_smem = smem_address(smem);
  const auto copy_stage = [&](int k_tile) {
    if (k_tile < k_tiles) {
      const uint32_t stage_smem = stages_smem + k_tile % Tile::kStages * Tile::kStageBytes;
      const int k = k_begin + k_tile * Tile::kDepth;
      copy_int8_tile<Tile, Tile::kRows>(stage_smem, a, p.stride_a, rows, k, k_end);
      copy_int8_tile<Tile, Tile::kColumns>(stage_smem + Tile::kABytes, b, p.stride_b, columns, k, k_end);
    }
    cp_async_commit_group();  // empty past the end, so that counting groups stays simple
  };
  // Rows of a: matrices 0 and 1 are rows 0-7 and 8-15, 2 and 3 the next chunk. Columns of b: matrices 0 and 1 are
  // chunks of columns 0-7, 2 and 3 those of columns 8-15.
  const uint32_t a_lane = int8_tile_offset<Tile::kDepth>(warp_row + lane % 16, lane / 16);
  const uint32_t b_lane =
      Tile::kABytes + int8_tile_offset<Tile::kDepth>(warp_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const auto load_fragments = [&](Int8Fragments<Tile>& fragments, int k_tile, int step) {
    const uint32_t stage_smem = stages_smem + k_tile % Tile::kStages * Tile::kStageBytes;
    fragments.load(stage_smem + a_lane, stage_smem + b_lane, step);
  };

  int32_t sums[Tile::kMmaRows][Tile::kMmaColumns][4] = {};
  Int8Fragments<Tile> fragments[2];
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy_stage(stage);
  cp_async_wait_group<Tile::kStages - 2>();
  __syncthreads();
  load_fragments(fragments[0], 0, 0);

  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if (step == Tile::kSteps - 1) {
        // The next stage has landed, and no warp reads this one any more: its last fragments are in registers.
        cp_async_wait_group<Tile::kStages - 2>();
        __syncthreads();
        load_fragments(fragments[(step + 1) % 2], k_tile + 1, 0);
      } else {
        load_fragments(fragments[(step + 1) % 2], k_tile, step + 1);
      }
      if (step == 0) copy_stage(k_tile + Tile::kStages - 1);  // into the stage before this one
      fragments[step % 2].multiply(sums);
    }
  }

  // The staging area lies over the ring, which other warps may still read (the fragments of the tile after the last).
  cp_async_wait_group<0>();
  __syncthreads();
  int32_t* staging = reinterpret_cast<int32_t*>(smem) + warp * Tile::kStagingElems;
  write_int8_tile<Tile, Out>(p, sums, tile.row + warp_row, tile.column + warp_column, staging);
}

// ---- the sum over the parts of a split: partial (splits, rows, stride_partial) int32, whole vectors of 4 columns

template <typename Out>
__global__ void __launch_bounds__(256) int8_matmul_finish_kernel(const __grid_constant__ Int8KernelParams p,
                                                                 const int32_t* partial, int64_t stride_partial) {
  const int64_t vectors = stride_partial / 4, index = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int64_t row = index / vectors, column = index % vectors * 4;
  if (row >= p.rows) return;
  int sum[4] = {};
  for (int split = 0; split < p.splits; ++split) {
    const int4 part = *reinterpret_cast<const int4*>(partial + (split * p.rows + row) * stride_partial + column);
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
  }
  const ColumnConstants<4> constants(p, column);
  finish_columns(p, sum, p.a_scale[row], constants, static_cast<Out*>(p.out) + row * p.stride_out + column,
                 p.columns - column);
}

}  // namespace fastattn
