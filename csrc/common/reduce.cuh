// Sums and maxima over the lanes of a warp and the warps of a block.
#pragma once

#include "common/cuda.cuh"

namespace fastattn {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

struct Sum {
  template <typename T>
  FASTATTN_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// NaN loses against a number, as in fmaxf.
struct Max {
  FASTATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  FASTATTN_DEVICE int operator()(int a, int b) const { return a > b ? a : b; }
};

// Reduces over groups of kLanes neighbouring lanes; every lane gets the result. kLanes = 4 is a row of an mma tile.
template <int kLanes = 32, typename Op, typename T>
FASTATTN_DEVICE T warp_reduce(T value, Op op) {
  static_assert(kLanes >= 1 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "a power of two up to 32");
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// The sum of the values of this lane and those before it. All lanes of the warp call it.
FASTATTN_DEVICE int warp_prefix_sum(int value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// Reduces over a block of kWarps full warps; every thread gets the result, computed in the same order. `scratch` is
// shared; the barrier in front lets it be used again at once.
template <int kWarps, typename Op, typename T>
FASTATTN_DEVICE T block_reduce(T value, Op op, T (&scratch)[kWarps]) {
  value = warp_reduce(value, op);
  if constexpr (kWarps == 1) return value;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total = op(total, scratch[warp]);
  return total;
}

}  // namespace fastattn
