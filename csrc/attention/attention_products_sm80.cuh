// The products that attention is made of, by one warp, and how accumulators leave for global memory.
#pragma once

#include "attention/attention_tile_sm80.cuh"
#include "common/vec.cuh"

namespace fastattn {

// acc += A B with both operands in shared memory, kDepth columns of A: fragments A by `a` (Fragment::kA), B by `b`
// (Fragment::kB: the transpose of b's tile). Unrolling less keeps the compiler from loading more fragments ahead than
// there are registers.
template <typename Element, int kDepth, int kUnroll = kDepth / 16, int kRowTiles, int kColTiles, typename LoaderA,
          typename LoaderB>
FASTATTN_DEVICE void multiply_tiles(float (&acc)[kRowTiles][kColTiles][4], const LoaderA& a, const LoaderB& b) {
#pragma unroll kUnroll
  for (int col = 0; col < kDepth; col += 16) {
    uint32_t a_rmem[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) a.load(a_rmem[m], 16 * m, col);
#pragma unroll
    for (int n = 0; n < kColTiles; n += 2) {
      uint32_t b_rmem[4];
      b.load(b_rmem, 8 * n, col);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) mma_pair<Element>(acc[m][n], acc[m][n + 1], a_rmem[m], b_rmem);
    }
  }
}

// acc += p B. The accumulators p are, two by two, the A operand: they are rounded, and never leave the registers.
// B by `b` (Fragment::kBTransposed: b's tile itself, whose rows are p's columns).
template <typename Element, int kRowTiles, int kDepthTiles, int kColTiles, typename LoaderB>
FASTATTN_DEVICE void multiply_accumulators(float (&acc)[kRowTiles][kColTiles][4],
                                           const float (&p)[kRowTiles][kDepthTiles][4], const LoaderB& b) {
#pragma unroll
  for (int depth = 0; depth < kDepthTiles; depth += 2) {
    uint32_t p_rmem[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&quad)[4] = p[m][depth + i / 2];
        p_rmem[m][i] = pack2<Element>(quad[i % 2 * 2], quad[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColTiles; n += 2) {
      uint32_t b_rmem[4];
      b.load(b_rmem, 8 * depth, 8 * n);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) mma_pair<Element>(acc[m][n], acc[m][n + 1], p_rmem[m], b_rmem);
    }
  }
}

// ---- accumulators to global memory

template <typename Tile>
FASTATTN_DEVICE uint8_t* staged_place(Tile tile, uint8_t* smem, int row, int col) {
  return smem + (tile.chunk_address(row, col) - tile.address);
}

// Writes factor * acc, rounded, into `tile`, which lies at `smem` and whose rows from `tile_row` on are this warp's to
// use. There accumulators become whole rows, which leave 16 bytes a lane.
template <typename Element, typename Tile, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void stage_accumulators(const float (&acc)[kRowTiles][kColTiles][4], float factor, Tile tile,
                                        uint8_t* smem, int tile_row, int lane) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint8_t* chunk = staged_place(tile, smem, tile_row + 16 * m + 8 * half + lane / 4, 8 * n);
        const uint32_t bits = pack2<Element>(factor * acc[m][n][2 * half], factor * acc[m][n][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(chunk + lane % 4 * 4) = bits;
      }
    }
  }
  __syncwarp();
}

// The first `cols` of eight elements of a row.
template <typename Element>
FASTATTN_DEVICE void store_staged_chunk(Element* dst, const uint8_t* chunk_smem, int cols, bool is_aligned) {
  const Vec<Element> chunk = load_vec<8>(reinterpret_cast<const Element*>(chunk_smem));
  if (is_aligned) {
    store_vec(dst, chunk);
  } else {
    for (int e = 0; e < min(8, cols); ++e) dst[e] = chunk[e];
  }
}

// Where a warp's accumulators go: `rows` rows of `cols` columns from `gmem`. Vectors of eight if `is_aligned`.
template <typename Element>
struct TileOutput {
  Element* gmem = nullptr;
  int64_t stride_row = 0;
  int rows = 0, cols = 0;
  bool is_aligned = false;
};

// Writes factor * acc to `output` through `tile`, as stage_accumulators takes it.
template <typename Element, typename Tile, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void store_accumulators(const float (&acc)[kRowTiles][kColTiles][4], float factor, Tile tile,
                                        uint8_t* smem, int tile_row, const TileOutput<Element>& output) {
  // Opaque, or a loop around would keep the addresses.
  stage_accumulators<Element>(acc, factor, tile, smem, tile_row, opaque(static_cast<int>(threadIdx.x) % 32));
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
  for (int i = lane; i < 16 * kRowTiles * kColTiles; i += 32) {
    const int row = i / kColTiles, col = i % kColTiles * 8;
    if (row >= output.rows || col >= output.cols) continue;
    Element* dst = output.gmem + row * output.stride_row + col;
    store_staged_chunk(dst, staged_place(tile, smem, tile_row + row, col), output.cols - col, output.is_aligned);
  }
}

}  // namespace fastattn
