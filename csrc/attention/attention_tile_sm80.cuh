// Tiles of 16-bit elements in shared memory, and how mma.m16n8k16 reads them; every attention kernel of sm_80 is made
// of these.
//
// Layout:  panels of 64 columns, one after another; a panel is rows of 128 bytes, which is every bank once. The 16-byte
//          chunk c of row r lies in place c ^ (r % 8) of its row. ldmatrix reads the same chunk of eight neighbouring
//          rows at a time, cp.async writes the eight chunks of a row: both touch every bank once.
// Copies:  thread i copies chunk i % 8 of rows i / 8, i / 8 + kThreads / 8, …: eight threads cover the 128 bytes of one
//          row of a panel, and each thread's place in the swizzle never changes.
#pragma once

#include "common/ptx.cuh"

namespace fastattn {

template <int kRows_, int kCols_>
struct SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPanelCols = 64, kRowBytes = 128, kChunkElems = 8;
  static constexpr int kPanels = (kCols + kPanelCols - 1) / kPanelCols;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0, "the swizzle permutes groups of eight rows");
  static_assert(kCols % 16 == 0, "mma consumes 16 columns");

  uint32_t address = 0;  // of shared memory, a multiple of 1024

  // Of the eight elements from `col` (a multiple of 8) of `row`.
  FASTATTN_DEVICE uint32_t chunk_address(int row, int col) const {
    const int chunk = (col % kPanelCols) / kChunkElems;
    return address + (col / kPanelCols) * kPanelBytes + row * kRowBytes + ((chunk ^ (row % 8)) << 4);
  }
};

// ---- global to shared

// Starts copying a tile. Rows from `rows` on and chunks of eight columns from `cols` on become zeros and are not read;
// the others are 16-byte aligned. `next_row_gmem` is called for the rows of this thread in turn, from its first on,
// kThreads / 8 apart, and returns where each one lies. The caller commits the group.
template <int kThreads, typename Tile, typename NextRow>
FASTATTN_DEVICE void load_tile_rows(Tile tile, int rows, int cols, NextRow next_row_gmem) {
  static_assert(kThreads % 64 == 0, "a step covers whole groups of eight rows");
  constexpr int kRowsPerStep = kThreads / 8;
  const int thread = static_cast<int>(threadIdx.x), first_row = thread / 8, col = thread % 8 * Tile::kChunkElems;
  const uint32_t dst = tile.chunk_address(first_row, col);
#pragma unroll
  for (int step = 0; step < (Tile::kRows + kRowsPerStep - 1) / kRowsPerStep; ++step) {
    const int row = first_row + step * kRowsPerStep;
    if (Tile::kRows % kRowsPerStep != 0 && row >= Tile::kRows) break;
    const auto* src = next_row_gmem(row) + col;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int panel_col = panel * Tile::kPanelCols + col;
      if (Tile::kCols % Tile::kPanelCols != 0 && panel_col >= Tile::kCols) break;
      cp_async<16>(dst + step * kRowsPerStep * Tile::kRowBytes + panel * Tile::kPanelBytes,
                   src + panel * Tile::kPanelCols, row < rows && panel_col < cols);
    }
  }
}

// The same for rows that lie stride_row elements apart, row 0 at `gmem`. One address is stepped along, because all of
// a thread's rows at once would take registers from the accumulators.
template <int kThreads, typename Tile, typename Element>
FASTATTN_DEVICE void load_tile(Tile tile, const Element* gmem, int64_t stride_row, int rows, int cols) {
  const Element* next = gmem + static_cast<int>(threadIdx.x) / 8 * stride_row;
  load_tile_rows<kThreads>(tile, rows, cols, [&](int) {
    const Element* row_gmem = next;
    next += kThreads / 8 * stride_row;
    return row_gmem;
  });
}

// ---- shared to registers

// What four 8 x 8 matrices of a tile are to the mma, at tile rows (row, row + 16) and columns (col, col + 16):
enum class Fragment {
  kA,            // A = the tile: f is a[4]
  kATransposed,  // A = the tile transposed: tile rows are A's columns (k), tile columns its rows (m); f is a[4]
  kB,            // B = the tile transposed: tile rows are B's columns (n), tile columns its rows (k)
  kBTransposed,  // B = the tile: tile rows are B's rows (k), tile columns its columns (n)
};  // f[0], f[1] are b[2] of B's first eight columns (n), f[2], f[3] of the next eight

// Loads fragments of one tile. Construct it once, outside the loops: it holds the lane's address, and load() adds
// constants that end up in the instruction.
template <Fragment kFragment, typename Tile>
struct FragmentLoader {
  uint32_t lane_address, offset = 0;  // apart, since the former is swizzled once for tiles that differ in the latter

  // Rows count from `row`, a multiple of 8, columns from `col`, a multiple of a power of two above every col of load().
  FASTATTN_DEVICE explicit FragmentLoader(Tile tile, int row = 0, int col = 0) {
    constexpr bool kRowsFirst = kFragment == Fragment::kA || kFragment == Fragment::kBTransposed;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int lane_row = kRowsFirst ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int lane_col = kRowsFirst ? lane / 16 * 8 : lane / 8 % 2 * 8;
    lane_address = tile.chunk_address(row + lane_row, col + lane_col);
  }

  // The same place of a tile that lies `bytes` (a multiple of 1024) behind this one.
  FASTATTN_DEVICE FragmentLoader behind(uint32_t bytes) const {
    FragmentLoader loader = *this;
    loader.offset += bytes;
    return loader;
  }

  // `row` a multiple of 8, `col` of 16.
  FASTATTN_DEVICE void load(uint32_t (&f)[4], int row, int col) const {
    // Chunk bits 1 and 2 are address bits 5 and 6, which neither the rows nor the panels touch: their xor with the
    // swizzle, already in lane_address, is an xor with the address.
    const uint32_t swizzled = lane_address ^ static_cast<uint32_t>(col % Tile::kPanelCols * 2);
    const uint32_t row_smem = swizzled + offset + col / Tile::kPanelCols * Tile::kPanelBytes + row * Tile::kRowBytes;
    if constexpr (kFragment == Fragment::kA || kFragment == Fragment::kB) {
      ldmatrix(f, row_smem);
    } else {
      ldmatrix_trans(f, row_smem);
    }
  }
};

// Two neighbouring accumulators of 16 x 8 += a b, with the b of a kB or kBTransposed fragment.
template <typename Element>
FASTATTN_DEVICE void mma_pair(float (&first)[4], float (&second)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  mma_m16n8k16<Element>(first, a, low);
  mma_m16n8k16<Element>(second, a, high);
}

}  // namespace fastattn
