// Tiles of 16-bit elements as TMA writes and wgmma reads them; every attention kernel of sm_90 is made of these.
//
// Layout:  panels of 64 columns (32 where 64 do not divide the tile's), one after another; a panel is rows of 128 (64)
//          bytes whose 16-byte chunks are permuted by the swizzle of that width. One copy moves one panel.
// Tensors: (batch, heads, seqlen, head_dim) with any strides that are multiples of 16 bytes. What a copy finds past
//          seqlen or head_dim is zero in shared memory and is not written in global memory: no head_dim needs padding.
// Scores:  wgmma's accumulators are those of mma.m16n8k16, so all of attention_scores.cuh and softmax.cuh serves them:
//          float s[1][columns / 8][4], of warp w of the warpgroup rows 16 w + lane / 4 (+ 8).
#pragma once

#include "attention/attention_scores.cuh"
#include "common/ptx_wgmma.cuh"

namespace fastattn {

template <int kRows_, int kCols_, int kPanelCols_ = kCols_ % 64 == 0 ? 64 : 32>
struct TileSm90 {
  static constexpr int kRows = kRows_, kCols = kCols_, kPanelCols = kPanelCols_;
  static constexpr Swizzle kSwizzle = kPanelCols == 64 ? Swizzle::k128 : Swizzle::k64;
  static constexpr int kRowBytes = 2 * kPanelCols;
  static constexpr int kPatternBytes = 8 * kRowBytes;  // after which the swizzle repeats
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kRowBytes, kBytes = kPanels * kPanelBytes;
  static_assert((kPanelCols == 64 || kPanelCols == 32) && kCols % kPanelCols == 0 && kRows % 8 == 0,
                "whole panels of whole patterns");

  uint32_t address = 0;  // of shared memory, a multiple of 1024

  // Of element (row, col) before the swizzle, from the tile's start: what descriptors are advanced by.
  FASTATTN_DEVICE static constexpr uint32_t offset(int row, int col) {
    return col / kPanelCols * kPanelBytes + row * kRowBytes + col % kPanelCols * 2;
  }
  // Of the eight elements from `col` (a multiple of 8) of `row`, for ordinary loads and stores, ldmatrix and stmatrix.
  FASTATTN_DEVICE uint32_t chunk_address(int row, int col) const {
    const int chunk = col % kPanelCols / 8, permuted = kPanelCols == 64 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
    return address + col / kPanelCols * kPanelBytes + row * kRowBytes + permuted * 16;
  }

  // The tile as an operand of which it holds a row of A, or a column of B, in each row: columns are summed over.
  FASTATTN_DEVICE uint64_t k_major() const { return wgmma_descriptor(address, 0, kPatternBytes, kSwizzle); }
  // The tile as an operand of which it holds a column of A, or a row of B, in each row: rows are summed over.
  FASTATTN_DEVICE uint64_t mn_major() const { return wgmma_descriptor(address, kPanelBytes, kPatternBytes, kSwizzle); }
};

// ---- copies

// The stride of a dimension of size 1 is never used, and may be anything in torch.
inline uint64_t stride_of_map(int64_t size, int64_t stride, int64_t head_dim) {
  return static_cast<uint64_t>(size > 1 ? stride : (head_dim + 7) / 8 * 8);
}

// Of a (batch, heads, seqlen, head_dim) tensor; a copy takes `box_rows` rows of one panel of Tile. Null, or the error.
template <typename Tile, typename Element>
const char* make_rows_map(TensorMap& map, const AttentionTensor& tensor, int64_t batch, int64_t heads, int64_t seqlen,
                          int64_t head_dim, int box_rows) {
  const auto stride = [&](int64_t size, int64_t elems) { return stride_of_map(size, elems, head_dim); };
  const uint64_t dim[4] = {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(seqlen), static_cast<uint64_t>(heads),
                           static_cast<uint64_t>(batch)};
  const uint64_t strides[4] = {1, stride(seqlen, tensor.stride_row), stride(heads, tensor.stride_head),
                               stride(batch, tensor.stride_batch)};
  const uint32_t box[4] = {Tile::kPanelCols, static_cast<uint32_t>(box_rows), 1, 1};
  return make_tensor_map(map, static_cast<const Element*>(tensor.data), dim, strides, box, Tile::kSwizzle);
}

// Of the same tensor with `group` heads, a power of two, packed into rows: row r is query r / group of head r % group.
// Positions are (column, head of the group, query, group, batch).
template <typename Tile, typename Element>
const char* make_packed_rows_map(TensorMap& map, const AttentionTensor& tensor, int64_t batch, int64_t heads, int group,
                                 int64_t seqlen, int64_t head_dim, int box_rows) {
  const auto stride = [&](int64_t size, int64_t elems) { return stride_of_map(size, elems, head_dim); };
  const int64_t groups = heads / group;
  const uint64_t dim[5] = {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(group), static_cast<uint64_t>(seqlen),
                           static_cast<uint64_t>(groups), static_cast<uint64_t>(batch)};
  const uint64_t strides[5] = {1, stride(group, tensor.stride_head), stride(seqlen, tensor.stride_row),
                               stride(groups, group * tensor.stride_head), stride(batch, tensor.stride_batch)};
  const auto box_heads = static_cast<uint32_t>(group < box_rows ? group : box_rows);
  const uint32_t box[5] = {Tile::kPanelCols, box_heads, static_cast<uint32_t>(box_rows) / box_heads, 1, 1};
  return make_tensor_map(map, static_cast<const Element*>(tensor.data), dim, strides, box, Tile::kSwizzle);
}

// Whether make_rows_map can describe the tensor. Rows that overlap or coincide (expanded dimensions) are left to
// kernels that follow pointers.
inline bool tma_can_address(const AttentionTensor& tensor, int64_t batch, int64_t heads, int64_t seqlen,
                            int64_t head_dim) {
  const auto serves = [](int64_t size, int64_t stride, int64_t least) {
    constexpr int64_t kLimit = int64_t{1} << 39;  // elements of 2 bytes
    return size <= 1 || (stride % 8 == 0 && stride >= least && stride < kLimit);
  };
  return reinterpret_cast<uint64_t>(tensor.data) % 16 == 0 && batch > 0 && heads > 0 && seqlen > 0 && head_dim > 0 &&
         serves(seqlen, tensor.stride_row, head_dim) && serves(heads, tensor.stride_head, 1) &&
         serves(batch, tensor.stride_batch, 1);
}

// Copies rows [row, row + Tile::kRows) to `tile_smem` and completes Tile::kBytes at the mbarrier. By one thread; the
// map's boxes have Tile::kRows rows.
template <typename Tile>
FASTATTN_DEVICE void load_tile_sm90(uint8_t* tile_smem, const TensorMap* map, uint64_t* barrier_smem, int row, int head,
                                    int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    tma_load(tile_smem + panel * Tile::kPanelBytes, map, barrier_smem, {panel * Tile::kPanelCols, row, head, batch});
  }
}

// Clears rows [row, Tile::kRows) of a tile at `tile_smem`; by one warp, to whose threads `thread` is threadIdx.x.
template <typename Tile>
FASTATTN_DEVICE void clear_last_rows(uint8_t* tile_smem, int row, int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kVec = 16;
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    uint8_t* const panel_smem = tile_smem + panel * Tile::kPanelBytes;
#pragma unroll 1
    for (int byte = row * Tile::kRowBytes + opaque(thread % 32) * kVec; byte < Tile::kPanelBytes; byte += 32 * kVec) {
      store_vec(reinterpret_cast<uint32_t*>(panel_smem + byte), Vec<uint32_t, 4>{});
    }
  }
}

// A place in a ring of stages. Producer and consumers count alike, across everything that they do.
template <int kStages>
struct RingPosition {
  uint32_t count = 0;
  FASTATTN_DEVICE int stage() const { return static_cast<int>(count % kStages); }
  FASTATTN_DEVICE int parity() const { return static_cast<int>(count / kStages % 2); }
};

// ---- products

// The accumulators of attention_scores.cuh as one wgmma takes them.
template <int kColTiles>
FASTATTN_DEVICE float (&wgmma_registers(float (&s)[1][kColTiles][4]))[4 * kColTiles] {
  return reinterpret_cast<float (&)[4 * kColTiles]>(s);
}

// d = a b^T, 64 rows of `a` (from `a_row`) by the rows of `b`. Between wgmma_fence and wgmma_commit_group.
template <typename Element, typename TileA, typename TileB, int kColTiles>
FASTATTN_DEVICE void issue_abt(float (&d)[1][kColTiles][4], TileA a, int a_row, TileB b) {
  static_assert(TileA::kCols == TileB::kCols && TileB::kRows == 8 * kColTiles, "the shapes of a product");
  const uint64_t a_descriptor = advance_descriptor(a.k_major(), TileA::offset(0, 0) + a_row * TileA::kRowBytes);
  const uint64_t b_descriptor = b.k_major();
#pragma unroll
  for (int k = 0; k < TileA::kCols; k += 16) {
    wgmma_m64k16<Element>(wgmma_registers(d), advance_descriptor(a_descriptor, TileA::offset(0, k)),
                          advance_descriptor(b_descriptor, TileB::offset(0, k)), k > 0);
  }
}

// d += a b, with a (64 rows, TileB::kRows columns) in registers as pack_a leaves it.
template <typename Element, typename TileB, int kColTiles>
FASTATTN_DEVICE void issue_ab(float (&d)[1][kColTiles][4], const uint32_t (&a)[TileB::kRows / 16][4], TileB b) {
  static_assert(TileB::kCols == 8 * kColTiles, "the shapes of a product");
  const uint64_t b_descriptor = b.mn_major();
#pragma unroll
  for (int k = 0; k < TileB::kRows; k += 16) {
    wgmma_m64k16<Element, Major::kMN>(wgmma_registers(d), a[k / 16],
                                      advance_descriptor(b_descriptor, TileB::offset(k, 0)), true);
  }
}

// Accumulators rounded to 16 bits are, two by two, the A operand of the next product: they never leave the registers.
template <typename Element, int kColTiles>
FASTATTN_DEVICE void pack_a(uint32_t (&a)[kColTiles / 2][4], const float (&p)[1][kColTiles][4]) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[n / 2][n % 2 * 2 + half] = pack2<Element>(p[0][n][2 * half], p[0][n][2 * half + 1]);
    }
  }
}

// Writes a warp's 16 rows (from `row`) of accumulators to a tile, rounded to 16 bits.
template <typename Element, typename Tile, int kColTiles>
FASTATTN_DEVICE void write_rows(Tile tile, int row, const float (&d)[1][kColTiles][4]) {
  static_assert(Tile::kCols >= 8 * kColTiles && kColTiles % 2 == 0, "the columns fit");
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);  // or the addresses take registers all along
  uint32_t fragments[kColTiles / 2][4];
  pack_a<Element>(fragments, d);
#pragma unroll
  for (int n = 0; n < kColTiles / 2; ++n) {
    stmatrix(tile.chunk_address(row + lane % 16, 16 * n + lane / 16 * 8), fragments[n]);
  }
}

}  // namespace fastattn
