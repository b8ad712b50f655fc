// Which kernel multiplies, and how its work is split: the host's part of int8_matmul on CUDA, without CUDA headers.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {

// Tiles of out, (rows) x (columns). kFewRows are those of int8_matmul_few_rows_sm80.cuh, by their columns; kHopper
// those of int8_matmul_sm90.cuh.
enum class Int8Tile : int {
  kFewRows8,
  kFewRows16,
  kFewRows32,
  k64x64,
  k64x128,
  k128x128,
  k128x256,
  kHopper128x128,
  kHopper128x256,
};

struct Int8TileFacts {
  Int8Tile tile;
  int rows, columns;
  int depth;           // of a stage
  double efficiency;   // of the card's tensor cores, once the ring is full: small tiles load more bytes per product
  int overhead_depth;  // filling the ring and writing the tile take as long as so much more k
};
constexpr Int8TileFacts kInt8Tiles[] = {
    {Int8Tile::k128x256, 128, 256, 64, 1.0, 256},
    {Int8Tile::k128x128, 128, 128, 64, 0.9, 256},
    {Int8Tile::k64x128, 64, 128, 64, 0.75, 256},
    {Int8Tile::k64x64, 64, 64, 128, 0.55, 256},
};
// mma reaches about half of what wgmma does. Ping-pong hides the epilogue, and the ring runs on across tiles.
constexpr Int8TileFacts kInt8HopperTiles[] = {
    {Int8Tile::kHopper128x256, 128, 256, 128, 1.0, 256}, {Int8Tile::kHopper128x128, 128, 128, 128, 0.8, 64},
    {Int8Tile::k128x128, 128, 128, 64, 0.5, 256},        {Int8Tile::k64x128, 64, 128, 64, 0.4, 256},
    {Int8Tile::k64x64, 64, 64, 128, 0.3, 256},
};
constexpr int kInt8FewRows = 16;
// Up to here every block quantises the input itself: its time and shared memory stay small beside those of its part of
// b.
constexpr int kInt8MaxFusedRows = 4;
constexpr int64_t kInt8MaxFusedElems = 32768;

constexpr bool is_hopper_tile(Int8Tile tile) {
  return tile == Int8Tile::kHopper128x128 || tile == Int8Tile::kHopper128x256;
}

constexpr bool is_few_rows_tile(Int8Tile tile) { return tile <= Int8Tile::kFewRows32; }

struct Int8Plan {
  Int8Tile tile = Int8Tile::k64x64;
  int splits = 1;
  int depth_per_split = 0;
};

constexpr int64_t int8_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole stages of k for each of up to `splits` parts, none of which is empty.
constexpr Int8Plan int8_split(const Int8TileFacts& facts, int64_t depth, int64_t splits) {
  const int64_t stages = int8_ceil_div(depth, facts.depth);
  const int64_t stages_per_split = stages > splits ? int8_ceil_div(stages, splits) : 1;
  const int64_t used = stages > 0 ? int8_ceil_div(stages, stages_per_split) : 1;
  return {facts.tile, static_cast<int>(used), static_cast<int>(stages_per_split * facts.depth)};
}

// The products on the busiest multiprocessor, at full efficiency. Adding the parts of a split takes another launch.
constexpr double int8_cost(const Int8TileFacts& facts, const Int8Plan& plan, int64_t rows, int64_t columns,
                           int multiprocessors) {
  constexpr double kFinishCost = 6e6;
  const int64_t blocks = int8_ceil_div(rows, facts.rows) * int8_ceil_div(columns, facts.columns) * plan.splits;
  const int64_t depth = plan.depth_per_split + facts.overhead_depth;
  const double products = static_cast<double>(facts.rows * facts.columns * depth) / facts.efficiency;
  return static_cast<double>(int8_ceil_div(blocks, multiprocessors)) * products + (plan.splits > 1 ? kFinishCost : 0.0);
}

// Whether one launch quantises and multiplies.
constexpr bool fuses_int8_quantization(const Int8MatmulParams& p, const Int8Plan& plan) {
  return p.a_dtype == p.out_dtype && is_few_rows_tile(plan.tile) && p.rows <= kInt8MaxFusedRows &&
         p.rows * p.depth <= kInt8MaxFusedElems;
}

template <int kCount>
constexpr Int8Plan best_int8_plan(const Int8TileFacts (&tiles)[kCount], int64_t rows, int64_t columns, int64_t depth,
                                  int multiprocessors) {
  Int8Plan best;
  double best_cost = -1.0;
  for (const Int8TileFacts& facts : tiles) {
    const bool small = facts.rows == 64;  // large tiles are for products that fill the card without a split
    for (int64_t splits = 1; splits <= (small ? 8 : 1); splits *= 2) {
      const Int8Plan plan = int8_split(facts, depth, splits);
      const double cost = int8_cost(facts, plan, rows, columns, multiprocessors);
      if (best_cost < 0.0 || cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
    }
  }
  return best;
}

// Depends on shapes and card alone, so that equal calls give equal launches.
constexpr Int8Plan plan_int8_matmul(int64_t rows, int64_t columns, int64_t depth, const DeviceLaunch& launch) {
  if (rows <= kInt8FewRows) {
    // Wide blocks read a less often; narrow ones keep every multiprocessor busy.
    const Int8Tile tile = columns >= int64_t{64} * launch.multiprocessors   ? Int8Tile::kFewRows32
                          : columns >= int64_t{32} * launch.multiprocessors ? Int8Tile::kFewRows16
                                                                            : Int8Tile::kFewRows8;
    return {tile, 1, static_cast<int>(depth)};
  }
  // TMA counts rows in int32, and a tensor map has no empty dimension.
  const bool hopper = launch.compute_capability == 90 && depth > 0 && rows <= INT32_MAX && columns <= INT32_MAX;
  return hopper ? best_int8_plan(kInt8HopperTiles, rows, columns, depth, launch.multiprocessors)
                : best_int8_plan(kInt8Tiles, rows, columns, depth, launch.multiprocessors);
}

// As those of int8_matmul.h, by a plan of the caller's: tests run every tile.
size_t int8_matmul_cuda_workspace_bytes(const Int8MatmulParams& p, const Int8Plan& plan);
const char* int8_matmul_cuda(const Int8MatmulParams& p, const Int8Plan& plan, const DeviceLaunch& launch);

}  // namespace fastattn
