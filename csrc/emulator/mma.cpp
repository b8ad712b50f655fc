// mma.sync (PTX ISA, "Matrix multiply-accumulate operation using mma instruction"). With g = lane / 4 and t = lane % 4,
// the fragments of m16n8k16 are
//   A (16 x 16)  a[q] holds row g + 8 (q % 2), columns 2 t + 8 (q / 2) and the next
//   B (16 x 8)   b[q] holds column g, rows 2 t + 8 q and the next
//   D (16 x 8)   d[q] is row g + 8 (q / 2), column 2 t + q % 2
// and those of m16n8k32 for int8 have four elements in a register, so 4 t in place of 2 t and 16 in place of 8.
#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

template <typename Accumulator>
struct MmaArgument {
  Accumulator* d;
  const uint32_t* a;
  const uint32_t* b;
};

static float to_float(Element element, uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return element == Element::kFloat16 ? __half2float({low}) : __bfloat162float({low});
}

template <typename Value, int kDepth>
struct Tiles {
  Value a[16][kDepth], b[kDepth][8], d[16][8];
};

template <typename Value, int kDepth>
static void multiply(Tiles<Value, kDepth>& tiles) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const Value factor = tiles.a[row][k];
      for (int column = 0; column < 8; ++column) tiles.d[row][column] += factor * tiles.b[k][column];
    }
  }
}

template <typename Value, int kDepth>
static void gather_accumulators(Tiles<Value, kDepth>& tiles, MmaArgument<Value>** lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int q = 0; q < 4; ++q) tiles.d[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2] = lanes[lane]->d[q];
  }
}

template <typename Value, int kDepth>
static void scatter_accumulators(const Tiles<Value, kDepth>& tiles, MmaArgument<Value>** lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int q = 0; q < 4; ++q) lanes[lane]->d[q] = tiles.d[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2];
  }
}

void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument<float> argument{d, a, b};
  collective(kFullMask, site, argument, [=](MmaArgument<float>** lanes, uint32_t) {
    Tiles<float, 16> tiles;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int q = 0; q < 4; ++q) {
        for (int half = 0; half < 2; ++half) {
          tiles.a[g + q % 2 * 8][2 * t + q / 2 * 8 + half] = to_float(element, lanes[lane]->a[q] >> (16 * half));
        }
      }
      for (int q = 0; q < 2; ++q) {
        for (int half = 0; half < 2; ++half) {
          tiles.b[2 * t + q * 8 + half][g] = to_float(element, lanes[lane]->b[q] >> (16 * half));
        }
      }
    }
    gather_accumulators(tiles, lanes);
    multiply(tiles);
    scatter_accumulators(tiles, lanes);
  });
}

void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument<int32_t> argument{d, a, b};
  collective(kFullMask, site, argument, [](MmaArgument<int32_t>** lanes, uint32_t) {
    Tiles<int32_t, 32> tiles;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int byte = 0; byte < 4; ++byte) {
        for (int q = 0; q < 4; ++q) {
          tiles.a[g + q % 2 * 8][4 * t + q / 2 * 16 + byte] = static_cast<int8_t>(lanes[lane]->a[q] >> (8 * byte));
        }
        for (int q = 0; q < 2; ++q) {
          tiles.b[4 * t + q * 16 + byte][g] = static_cast<int8_t>(lanes[lane]->b[q] >> (8 * byte));
        }
      }
    }
    gather_accumulators(tiles, lanes);
    multiply(tiles);
    scatter_accumulators(tiles, lanes);
  });
}

}  // namespace fastattn::emu
