// What the tiles of Hopper's attention kernels tell wgmma, and where their elements lie: for tests/test_ptx_tiles.py.
#include "attention/attention_tile_sm90.cuh"

using namespace fastattn;

namespace {

constexpr uint32_t kTileAddress = 3 * 1024;

// Writes the descriptors of the steps of 16 along the summed dimension, from `first` of the other one on, as issue_abt
// and issue_ab make them; and where each eight elements of a row lie.
template <typename Tile>
const char* describe(bool mn_major, int first, uint64_t* descriptors, uint32_t* places) {
  const Tile tile{kTileAddress};
  const uint64_t start = mn_major ? advance_descriptor(tile.mn_major(), Tile::offset(0, first))
                                  : advance_descriptor(tile.k_major(), Tile::offset(first, 0));
  const int depth = mn_major ? Tile::kRows : Tile::kCols;
  for (int k = 0; k < depth; k += 16) {
    descriptors[k / 16] = advance_descriptor(start, mn_major ? Tile::offset(k, 0) : Tile::offset(0, k));
  }
  for (int row = 0; row < Tile::kRows; ++row) {
    for (int col = 0; col < Tile::kCols; col += 8) *places++ = tile.chunk_address(row, col);
  }
  return nullptr;
}

}  // namespace

extern "C" const char* attention_tile(int rows, int cols, int mn_major, int first, uint64_t* descriptors,
                                      uint32_t* places, void*) {
  const auto is = [&](int tile_rows, int tile_cols) { return rows == tile_rows && cols == tile_cols; };
  const bool mn = mn_major != 0;
  if (is(64, 64)) return describe<TileSm90<64, 64>>(mn, first, descriptors, places);
  if (is(128, 64)) return describe<TileSm90<128, 64>>(mn, first, descriptors, places);
  if (is(128, 96)) return describe<TileSm90<128, 96>>(mn, first, descriptors, places);
  if (is(128, 128)) return describe<TileSm90<128, 128>>(mn, first, descriptors, places);
  if (is(96, 192)) return describe<TileSm90<96, 192>>(mn, first, descriptors, places);
  if (is(80, 256)) return describe<TileSm90<80, 256>>(mn, first, descriptors, places);
  return "attention_tile: not one of the tiles";
}
