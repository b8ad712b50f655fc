// Instructions in which the lanes of a warp exchange registers: shuffles, votes, ldmatrix, stmatrix.
#include <cstring>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

struct ShuffleArgument {
  uint32_t value;
  int operand;
  uint32_t result;
};

// The lane that `lane` reads from within its segment of `width` lanes, or itself where the source is outside of it.
static int shuffle_source(Shuffle kind, int lane, int operand, int width) {
  const int segment = lane & ~(width - 1);
  switch (kind) {
    case Shuffle::kIndex:
      return segment | (operand & (width - 1));
    case Shuffle::kUp:
      return lane - operand >= segment ? lane - operand : lane;
    case Shuffle::kDown:
      return lane + operand < segment + width ? lane + operand : lane;
    default:
      return (lane ^ operand) < segment + width ? lane ^ operand : lane;
  }
}

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) fail(site, "width %d", width);
  ShuffleArgument argument{value, operand, 0};
  collective(mask, site, argument, [&](ShuffleArgument** lanes, uint32_t present) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((present >> lane & 1) == 0) continue;
      const int source = shuffle_source(kind, lane, lanes[lane]->operand, width);
      if ((present >> source & 1) == 0) {
        fail(site, "lane %d reads lane %d, which is not in mask %08x", lane, source, present);
      }
      lanes[lane]->result = lanes[source]->value;
    }
  });
  return argument.result;
}

struct BallotArgument {
  bool predicate;
  uint32_t result;
};

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  BallotArgument argument{predicate, 0};
  collective(mask, site, argument, [](BallotArgument** lanes, uint32_t present) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (present >> lane & 1) votes |= uint32_t{lanes[lane]->predicate} << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (present >> lane & 1) lanes[lane]->result = votes;
    }
  });
  return argument.result;
}

// PTX leaves open which lane is elected, only that it is always the same one; here it depends on the seed.
bool elect_sync(uint32_t mask, Site site) {
  uint32_t candidates = ballot(mask, true, site);
  const uint64_t draw = (config().seed + 1) * 0x9E3779B97F4A7C15ull;
  for (uint32_t skip = static_cast<uint32_t>(draw >> 40) % static_cast<uint32_t>(std::popcount(candidates)); skip > 0;
       --skip) {
    candidates &= candidates - 1;
  }
  return std::countr_zero(candidates) == current_thread().lane;
}

// ---- ldmatrix, stmatrix. Lane 8 i + r holds the address of row r of matrix i. Lane l holds
// elements (l / 4, 2 (l % 4)) and the next one in that row, or, transposed, (2 (l % 4), l / 4) and the next row's.

struct MatrixArgument {
  uint32_t* registers;
  uint8_t* row;
};
using Matrix = uint16_t[8][8];
constexpr int kMatrixRowBytes = 16;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;

void ldmatrix(uint32_t* destination, int matrices, bool transposed, uint32_t row_address, Site site) {
  // The addresses of lanes beyond the last matrix are ignored.
  const bool gives_row = current_thread().lane < 8 * matrices;
  MatrixArgument argument{destination, gives_row ? shared_pointer(row_address, kMatrixRowBytes, 16, site) : nullptr};
  if (gives_row) tsan_read(argument.row, kMatrixRowBytes);
  collective(kFullMask, site, argument, [=](MatrixArgument** lanes, uint32_t) {
    for (int i = 0; i < matrices; ++i) {
      Matrix matrix;
      for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], lanes[8 * i + row]->row, kMatrixRowBytes);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint16_t low = transposed ? matrix[minor][major] : matrix[major][minor];
        const uint16_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        lanes[lane]->registers[i] = uint32_t{low} | uint32_t{high} << 16;
      }
    }
  });
}

void stmatrix(uint32_t row_address, const uint32_t* source, int matrices, bool transposed, Site site) {
  const bool gives_row = current_thread().lane < 8 * matrices;
  MatrixArgument argument{const_cast<uint32_t*>(source),
                          gives_row ? shared_pointer(row_address, kMatrixRowBytes, 16, site) : nullptr};
  if (gives_row) tsan_write(argument.row, kMatrixRowBytes);
  collective(kFullMask, site, argument, [=](MatrixArgument** lanes, uint32_t) {
    for (int i = 0; i < matrices; ++i) {
      Matrix matrix;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint32_t pair = lanes[lane]->registers[i];
        (transposed ? matrix[minor][major] : matrix[major][minor]) = static_cast<uint16_t>(pair);
        (transposed ? matrix[minor + 1][major] : matrix[major][minor + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      for (int row = 0; row < 8; ++row) std::memcpy(lanes[8 * i + row]->row, matrix[row], kMatrixRowBytes);
    }
  });
}

}  // namespace fastattn::emu
