// What a kernel source sees instead of CUDA's headers when g++ or clang++ compiles it for the emulator.
#pragma once

#include <algorithm>
#include <atomic>
#include <source_location>
#include <type_traits>

#include "emulator/types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

namespace fastattn::emu {

using At = std::source_location;

// An instruction and the kernel line it stands on.
struct Site {
  const char* op = nullptr;
  const char* file = nullptr;
  unsigned line = 0;
  Site() = default;
  Site(const char* op_, const At& at) : op(op_), file(at.file_name()), line(at.line()) {}
};

// What a running thread can look up without a call.
struct ThreadView {
  uint3 thread_index{};
  uint3 block_index{};
  dim3 block_dim, grid_dim;
  uint8_t* dynamic_shared = nullptr;
  int ignore_scopes = 0;  // open ones, for ThreadSanitizer
};
// One pointer is all the thread-local storage there is: large thread_local objects keep a library from being loaded.
extern thread_local ThreadView* current_view;

enum class Shuffle : int { kIndex, kUp, kDown, kXor };

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
void sync_warp(uint32_t mask, Site site);
void sync_block(Site site);
void* static_shared(const void* key, size_t bytes, size_t alignment, Site site);

template <typename T>
T shuffle_as(Shuffle kind, uint32_t mask, T value, int operand, int width, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(shuffle(kind, mask, std::bit_cast<uint32_t>(value), operand, width, site));
  } else {
    const uint64_t bits = std::bit_cast<uint64_t>(value);
    const uint64_t low = shuffle(kind, mask, static_cast<uint32_t>(bits), operand, width, site);
    const uint64_t high = shuffle(kind, mask, static_cast<uint32_t>(bits >> 32), operand, width, site);
    return std::bit_cast<T>(low | high << 32);
  }
}

}  // namespace fastattn::emu

#define threadIdx (::fastattn::emu::current_view->thread_index)
#define blockIdx (::fastattn::emu::current_view->block_index)
#define blockDim (::fastattn::emu::current_view->block_dim)
#define gridDim (::fastattn::emu::current_view->grid_dim)
constexpr int warpSize = 32;

// ---- synchronisation, shuffles, votes (CUDA C++ Programming Guide, "C++ Language Extensions")
inline void __syncthreads(fastattn::emu::At at = fastattn::emu::At::current()) {
  fastattn::emu::sync_block({"__syncthreads", at});
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, fastattn::emu::At at = fastattn::emu::At::current()) {
  fastattn::emu::sync_warp(mask, {"__syncwarp", at});
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, fastattn::emu::At at = fastattn::emu::At::current()) {
  return fastattn::emu::shuffle_as(fastattn::emu::Shuffle::kIndex, mask, value, lane, width, {"__shfl_sync", at});
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 fastattn::emu::At at = fastattn::emu::At::current()) {
  const int operand = static_cast<int>(delta);
  return fastattn::emu::shuffle_as(fastattn::emu::Shuffle::kUp, mask, value, operand, width, {"__shfl_up_sync", at});
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   fastattn::emu::At at = fastattn::emu::At::current()) {
  const int operand = static_cast<int>(delta);
  return fastattn::emu::shuffle_as(fastattn::emu::Shuffle::kDown, mask, value, operand, width,
                                   {"__shfl_down_sync", at});
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                  fastattn::emu::At at = fastattn::emu::At::current()) {
  return fastattn::emu::shuffle_as(fastattn::emu::Shuffle::kXor, mask, value, lane_mask, width,
                                   {"__shfl_xor_sync", at});
}
inline unsigned __ballot_sync(uint32_t mask, bool predicate, fastattn::emu::At at = fastattn::emu::At::current()) {
  return fastattn::emu::ballot(mask, predicate, {"__ballot_sync", at});
}
inline int __any_sync(uint32_t mask, bool predicate, fastattn::emu::At at = fastattn::emu::At::current()) {
  return fastattn::emu::ballot(mask, predicate, {"__any_sync", at}) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, fastattn::emu::At at = fastattn::emu::At::current()) {
  return fastattn::emu::ballot(mask, !predicate, {"__all_sync", at}) == 0;
}

// ---- atomics: relaxed, as on the device
template <typename T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, T expected, T desired) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (old < value && !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ---- memory and integer intrinsics
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = (selector >> (4 * i)) & 0x7u;
    result |= static_cast<unsigned>((bytes >> (8 * from)) & 0xFFu) << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}
inline int __float2int_rn(float value) {  // saturates; NaN gives 0
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(value));
}
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }

// ---- arithmetic
using std::max;
using std::min;
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fdividef(float numerator, float denominator) { return numerator / denominator; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
