// INT8 matrix product on Hopper:  out = activation((a b^T) * a_scale * b_scale + bias), a (M, K), b (N, K).
// Work:    persistent blocks of three warpgroups. One thread of the first feeds a ring of tiles in shared memory by
//          TMA, the two others multiply by wgmma, as Int8Schedule says.
// Memory:  both operands have k contiguous, the only layout wgmma takes for 8 bits. A stage holds 128 bytes of k, one
//          line of the 128-byte swizzle, of every row of a and b. The ring runs on across tiles: the next tile's first
//          stages arrive during the epilogue. Sums go through shared memory in pieces, to be stored in full lines.
// Numbers: int32 sums are exact; TMA fills with zeros what lies past M, N and K. int8_epilogue.cuh has the rest.
#pragma once

#include "common/ptx_wgmma.cuh"
#include "int8_matmul/int8_matmul_sm80.cuh"

namespace fastattn {

// How two warpgroups share a block's tiles of out.
enum class Int8Schedule : int {
  kCooperative,  // each has half the rows of every tile, and its full width in one product, which reads a once
  kHalves,       // the same, but by column halves: one half is written out while the other one is multiplied
  kPingPong,     // each has every other tile to itself: one writes out while the other one multiplies
};

template <int kRows_, int kColumns_, Int8Schedule kSchedule_, int kStages_>
struct Int8Sm90Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr Int8Schedule kSchedule = kSchedule_;
  static constexpr bool kPingPong = kSchedule == Int8Schedule::kPingPong;
  static constexpr bool kHalves = kSchedule == Int8Schedule::kHalves;
  static constexpr int kStages = kStages_;
  static constexpr int kDepth = 128;  // bytes of k, of one stage

  static constexpr int kWarpgroups = 2;  // that multiply
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kGroupRows = kPingPong ? kRows : kRows / kWarpgroups;
  // The products of a warpgroup lie side by side (kHalves) or one above the other, this many rows and columns each.
  static constexpr int kProducts = kHalves ? 2 : kGroupRows / 64;
  static constexpr int kProductColumns = kHalves ? kColumns / 2 : kColumns, kRegisters = kProductColumns / 2;
  static constexpr int row_of(int product) { return kHalves ? 0 : 64 * product; }
  static constexpr int column_of(int product) { return kHalves ? kProductColumns * product : 0; }
  // kHalves: the stages at either end of a tile whose products are taken half by half.
  static constexpr int kHalfStages = 2;
  static constexpr int kABytes = kRows * kDepth, kStageBytes = (kRows + kColumns) * kDepth;
  static constexpr int kReleases = 4 * (kPingPong ? 1 : kWarpgroups);  // warps that read a stage

  // A warp's sums pass through shared memory 8 rows and 64 columns at a time; for the pitch see Int8TileShape.
  static constexpr int kStagingColumns = 64, kStagingPitch = kStagingColumns + 8;
  static constexpr int kStagingElems = 8 * kStagingPitch;

  // 65536 registers for three warpgroups: what the producer gives up, the others get.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  static_assert(!kHalves || (kGroupRows == 64 && 2 * kHalfStages <= kStages),
                "the next tile's first stages arrive while the last ones of this are in use");
  static_assert(kGroupRows % 64 == 0 && kProducts * kRegisters <= 128,
                "the sums of a tile fit a warpgroup's registers");
  static_assert(kRows <= 256 && kColumns <= 256 && kColumns % kStagingColumns == 0, "one TMA box each");
};

template <typename Shape>
struct Int8Sm90Smem {
  alignas(1024) uint8_t stage[Shape::kStages][Shape::kStageBytes];  // rows of a, then of b
  alignas(16) int32_t staging[4 * Shape::kWarpgroups][Shape::kStagingElems];
  uint64_t full[Shape::kStages], empty[Shape::kStages];
};

// A place in the ring. Producer and consumers count stages alike, across tiles.
template <typename Shape>
struct Int8RingPosition {
  uint32_t count = 0;
  FASTATTN_DEVICE int stage() const { return static_cast<int>(count % Shape::kStages); }
  FASTATTN_DEVICE int parity() const { return static_cast<int>(count / Shape::kStages % 2); }
};

// ---- producer: one thread

template <typename Shape>
FASTATTN_DEVICE void produce_int8_stages(Int8Sm90Smem<Shape>& smem, const Int8KernelParams& p, const TensorMap* a_map,
                                         const TensorMap* b_map, int tiles, int k_tiles) {
  Int8RingPosition<Shape> at;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Int8TileIndex index = int8_tile_of_block<Shape>(tile, p.rows, p.columns);
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ++at.count) {
      uint64_t* const full = &smem.full[at.stage()];
      uint8_t* const stage = smem.stage[at.stage()];
      mbarrier_wait(&smem.empty[at.stage()], at.parity() ^ 1);  // the first round finds every stage empty
      mbarrier_arrive_expect_tx(full, Shape::kStageBytes);
      const int k = k_tile * Shape::kDepth;
      tma_load(stage, a_map, full, {k, static_cast<int>(index.row)});
      tma_load(stage + Shape::kABytes, b_map, full, {k, static_cast<int>(index.column)});
    }
  }
}

// ---- consumers: warpgroups

// Ping-pong warpgroups take turns in feeding the tensor cores. One that ran ahead of the other would also wait at an
// mbarrier for the phase after the next; its parity is that of the phase before, so it would not wait at all.
template <typename Shape>
FASTATTN_DEVICE void wait_for_turn(int group) {
  if constexpr (Shape::kPingPong) bar_sync(1 + group, 128 * Shape::kWarpgroups);
}
template <typename Shape>
FASTATTN_DEVICE void give_turn_to(int group) {
  if constexpr (Shape::kPingPong) bar_arrive(1 + group, 128 * Shape::kWarpgroups);
}

// Waits for the stage at `at` and issues its products kFirst to kEnd - 1.
template <int kFirst, int kEnd, typename Shape>
FASTATTN_DEVICE void issue_int8_stage(int32_t (&sums)[Shape::kProducts][Shape::kRegisters], Int8Sm90Smem<Shape>& smem,
                                      Int8RingPosition<Shape> at, int first_row, bool accumulate) {
  mbarrier_wait(&smem.full[at.stage()], at.parity());
  const uint32_t stage_smem = smem_address(smem.stage[at.stage()]);
  // K-major with the 128-byte swizzle: 8 rows of 128 bytes to a pattern.
  constexpr uint32_t kPatternBytes = 8 * Shape::kDepth;
  const uint64_t a = wgmma_descriptor(stage_smem + first_row * Shape::kDepth, 0, kPatternBytes, Swizzle::k128);
  const uint64_t b = wgmma_descriptor(stage_smem + Shape::kABytes, 0, kPatternBytes, Swizzle::k128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kDepth / 32; ++step) {
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i) {
      wgmma_m64k32_s8(sums[i], advance_descriptor(a, Shape::row_of(i) * Shape::kDepth + step * 32),
                      advance_descriptor(b, Shape::column_of(i) * Shape::kDepth + step * 32), accumulate || step > 0);
    }
  }
}

// Hands the stage at `at` back to the producer: this warp's products of it have finished.
template <typename Shape>
FASTATTN_DEVICE void release_int8_stage(Int8Sm90Smem<Shape>& smem, Int8RingPosition<Shape> at) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(&smem.empty[at.stage()]);
}

// Adds up the products of `k_tiles` stages, on top of what `sums` holds if `accumulate`. `at` moves past them. One
// group of products is always in flight: a stage is released when the next one's are under way. `next_group` multiplies
// next; -1 if nobody does.
template <typename Shape>
FASTATTN_DEVICE void multiply_int8_tile(int32_t (&sums)[Shape::kProducts][Shape::kRegisters], Int8Sm90Smem<Shape>& smem,
                                        Int8RingPosition<Shape>& at, int first_row, int k_tiles, bool accumulate,
                                        int next_group) {
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ++at.count) {
    issue_int8_stage<0, Shape::kProducts>(sums, smem, at, first_row, accumulate || k_tile > 0);
    wgmma_commit_group();
    if (k_tile > 0) {
      wgmma_wait_group<1>();
      release_int8_stage(smem, Int8RingPosition<Shape>{at.count - 1});
    }
  }
  if (next_group >= 0) give_turn_to<Shape>(next_group);
  wgmma_wait_group<0>();
#pragma unroll
  for (int i = 0; i < Shape::kProducts; ++i) pin_accumulators(sums[i]);
  if (k_tiles > 0) release_int8_stage(smem, Int8RingPosition<Shape>{at.count - 1});
}

// Stores a warp's 16 rows of a product: rows g and columns 2 t of each 8 x 8 fragment pass through `staging`, first
// those of the upper eight rows, then the lower. (row, column): the warp's first element in out.
template <typename Shape, typename Out>
FASTATTN_DEVICE void write_int8_product(const Int8KernelParams& p, const int32_t (&sums)[Shape::kRegisters],
                                        int64_t row, int64_t column, int32_t* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int first = 0; first < Shape::kProductColumns; first += Shape::kStagingColumns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncwarp();  // the piece before has been read
#pragma unroll
      for (int j = 0; j < Shape::kStagingColumns / 8; ++j) {
        const int32_t* d = &sums[(first / 8 + j) * 4 + 2 * half];
        *reinterpret_cast<int2*>(staging + g * Shape::kStagingPitch + 8 * j + 2 * t) = make_int2(d[0], d[1]);
      }
      __syncwarp();
      store_staged_sums<Out, 8, Shape::kStagingColumns, Shape::kStagingPitch>(p, staging, row + 8 * half,
                                                                              column + first);
    }
  }
}

template <typename Shape, typename Out>
FASTATTN_DEVICE void consume_int8_tiles(Int8Sm90Smem<Shape>& smem, const Int8KernelParams& p, int tiles, int k_tiles) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4, group = warp / 4;
  const int first_row = Shape::kPingPong ? 0 : group * Shape::kGroupRows;
  // Ping-pong: every other tile of the block's, and past the other's stages in between.
  constexpr int kTileStep = Shape::kPingPong ? Shape::kWarpgroups : 1;
  const int first_tile = Shape::kPingPong ? group : 0;
  Int8RingPosition<Shape> at{static_cast<uint32_t>(first_tile * k_tiles)};
  int32_t sums[Shape::kProducts][Shape::kRegisters] = {};
  if (group == 1) give_turn_to<Shape>(0);
  for (int tile = blockIdx.x + first_tile * gridDim.x; tile < tiles; tile += kTileStep * gridDim.x) {
    const Int8TileIndex index = int8_tile_of_block<Shape>(tile, p.rows, p.columns);
    const bool another = tile + static_cast<int>(gridDim.x) < tiles;
    wait_for_turn<Shape>(group);
    multiply_int8_tile(sums, smem, at, first_row, k_tiles, false, another ? 1 - group : -1);
    at.count += (kTileStep - 1) * k_tiles;
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
      const int64_t row = index.row + first_row + Shape::row_of(i) + 16 * (warp % 4);
      write_int8_product<Shape, Out>(p, sums[i], row, index.column, smem.staging[warp]);
    }
  }
}

// The registers hold one tile's sums and no more, so half of them are written out while the products of the other half
// run: the left columns' at the end of their tile, under the right columns' products of the last stages; the right
// columns' under the left ones' products of the next tile's first stages. k_tiles is at least 2 kHalfStages.
template <typename Shape, typename Out>
FASTATTN_DEVICE void consume_int8_tiles_by_halves(Int8Sm90Smem<Shape>& smem, const Int8KernelParams& p, int tiles,
                                                  int k_tiles) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4, first_row = warp / 4 * Shape::kGroupRows;
  Int8RingPosition<Shape> at;
  int32_t sums[Shape::kProducts][Shape::kRegisters] = {};
  Int8TileIndex index = {};
  // Starts, as one group, the products of the kHalfStages stages from `at` on for the columns of one half.
  const auto start_half = [&](auto half, bool accumulate) {
    Int8RingPosition<Shape> stage = at;
#pragma unroll
    for (int i = 0; i < Shape::kHalfStages; ++i, ++stage.count) {
      issue_int8_stage<half(), half() + 1>(sums, smem, stage, first_row, accumulate || i > 0);
    }
    wgmma_commit_group();
  };
  const auto write_half = [&](auto half) {
    write_int8_product<Shape, Out>(p, sums[half()], index.row + first_row + 16 * (warp % 4),
                                   index.column + Shape::column_of(half()), smem.staging[warp]);
  };
  const auto release_half_stages = [&] {
    for (int i = 0; i < Shape::kHalfStages; ++i, ++at.count) release_int8_stage(smem, at);
  };
  constexpr std::integral_constant<int, 0> kLeft{};
  constexpr std::integral_constant<int, 1> kRight{};
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    start_half(kLeft, false);
    wgmma_wait_group<1>();  // never waits: it tells the compiler that the right columns' sums are ready
    if (tile != static_cast<int>(blockIdx.x)) write_half(kRight);
    index = int8_tile_of_block<Shape>(tile, p.rows, p.columns);
    start_half(kRight, false);
    wgmma_wait_group<0>();
    pin_accumulators(sums[kLeft()]);
    pin_accumulators(sums[kRight()]);
    release_half_stages();

    multiply_int8_tile(sums, smem, at, first_row, k_tiles - 2 * Shape::kHalfStages, true, -1);

    start_half(kLeft, true);
    start_half(kRight, true);
    wgmma_wait_group<1>();
    pin_accumulators(sums[kLeft()]);
    write_half(kLeft);
    wgmma_wait_group<0>();
    pin_accumulators(sums[kRight()]);
    release_half_stages();
  }
  write_half(kRight);
}

// ---- kernel

template <typename Shape, typename Out>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    int8_matmul_sm90_kernel(const __grid_constant__ Int8KernelParams p, const __grid_constant__ TensorMap a_map,
                            const __grid_constant__ TensorMap b_map, int tiles) {
  FASTATTN_DYNAMIC_SMEM(bytes);
  auto& smem = *reinterpret_cast<Int8Sm90Smem<Shape>*>(bytes);
  const int k_tiles = (p.depth + Shape::kDepth - 1) / Shape::kDepth;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&b_map);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(&smem.full[stage], 1);
      mbarrier_init(&smem.empty[stage], Shape::kReleases);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) produce_int8_stages(smem, p, &a_map, &b_map, tiles, k_tiles);
  } else {
    setmaxnreg_inc<Shape::kConsumerRegisters>();
    if constexpr (Shape::kHalves) {
      consume_int8_tiles_by_halves<Shape, Out>(smem, p, tiles, k_tiles);
    } else {
      consume_int8_tiles<Shape, Out>(smem, p, tiles, k_tiles);
    }
  }
}

}  // namespace fastattn
