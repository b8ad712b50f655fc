// Kernels that break one rule each. The emulator must name the rule and the line; a device would hang, fault or give
// wrong numbers, so these never run there. Every kernel gets `data`, `count` floats of global memory.
#include "common/launch.cuh"
#include "common/ptx_cluster.cuh"
#include "common/ptx_wgmma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

using namespace fastattn;

#define KERNEL(name, threads, smem_bytes)                                                                        \
  __global__ void __launch_bounds__(threads, 1) name##_kernel(float* data, int count);                           \
  extern "C" const char* misuse_##name(float* data, int count, void* stream) {                                   \
    return launch_kernel(name##_kernel, 1, threads, smem_bytes, static_cast<cudaStream_t>(stream), data, count); \
  }                                                                                                              \
  __global__ void __launch_bounds__(threads, 1) name##_kernel([[maybe_unused]] float* data, [[maybe_unused]] int count)

// ---- meeting points

KERNEL(barrier_not_reached_by_one_warp, 96, 0) {
  if (threadIdx.x / 32 != 1) __syncthreads();
}

KERNEL(lanes_at_different_instructions, 32, 0) {
  if (threadIdx.x < 16) {
    data[0] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
  } else {
    __syncwarp();
  }
}

KERNEL(lanes_at_one_barrier_from_different_lines, 64, 0) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

KERNEL(shuffle_from_outside_the_mask, 32, 0) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0xFFFFu, 1.0f, threadIdx.x + 16);
}

KERNEL(lane_outside_its_mask, 32, 0) { __syncwarp(0xFFFFu); }

KERNEL(barrier_with_two_counts, 128, 0) { bar_sync(1, threadIdx.x < 32 ? 64 : 128); }

KERNEL(barrier_of_half_a_warp, 64, 0) { bar_sync(1, 48); }

// ---- shared and global memory

KERNEL(copy_past_the_end_of_shared, 32, 256) {
  FASTATTN_DYNAMIC_SMEM(smem);
  cp_async<16>(smem_address(smem) + 16 * threadIdx.x, data);
  cp_async_commit_group();
  cp_async_wait_group<0>();
}

KERNEL(vector_from_a_misaligned_address, 32, 0) {
  if (threadIdx.x < 2) data[8] = load_vec<4>(data + threadIdx.x)[0];
}

KERNEL(vector_to_a_misaligned_address, 32, 0) {
  if (threadIdx.x < 2) store_vec(data + threadIdx.x, Vec<float, 2>{{1.0f, 2.0f}});
}

KERNEL(copy_from_past_the_end_of_global, 32, 512) {
  FASTATTN_DYNAMIC_SMEM(smem);
  cp_async<16>(smem_address(smem) + 16 * threadIdx.x, data + 4 * (threadIdx.x + 1), 4 * threadIdx.x < count);
  cp_async_commit_group();
  cp_async_wait_group<0>();
}

KERNEL(copy_from_a_misaligned_address, 32, 512) {
  FASTATTN_DYNAMIC_SMEM(smem);
  cp_async<16>(smem_address(smem) + 16 * threadIdx.x, data + threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<0>();
}

KERNEL(store_past_the_end_of_dynamic_shared, 32, 256) {
  FASTATTN_DYNAMIC_SMEM(smem);
  reinterpret_cast<float*>(smem)[threadIdx.x * 3 + 1] = 1.0f;
  __syncthreads();
}

KERNEL(store_past_the_end_of_static_shared, 32, 0) {
  FASTATTN_SHARED(values, float[16]);
  float* unchecked = values;
  unchecked[threadIdx.x % 17] = 1.0f;
  __syncthreads();
}

KERNEL(exit_with_a_copy_in_flight, 32, 512) {
  FASTATTN_DYNAMIC_SMEM(smem);
  cp_async<16>(smem_address(smem) + 16 * threadIdx.x, data);
  cp_async_commit_group();
}

KERNEL(uninitialised_shared, 32, 128) {  // no error: NaN
  FASTATTN_DYNAMIC_SMEM(smem);
  data[threadIdx.x] = reinterpret_cast<float*>(smem)[threadIdx.x];
}

// ---- mbarriers

__device__ inline void init_barrier(uint64_t* barrier, int count) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}

KERNEL(mbarrier_before_init, 32, 0) {
  FASTATTN_SHARED(barrier, uint64_t[1]);
  mbarrier_arrive(&barrier[0]);
}

KERNEL(mbarrier_initialised_twice, 32, 0) {
  FASTATTN_SHARED(barrier, uint64_t[1]);
  mbarrier_init(&barrier[0], 1);
}

KERNEL(mbarrier_overwritten, 32, 0) {
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 32);
  barrier[0] = 0;
  mbarrier_arrive(&barrier[0]);
}

KERNEL(mbarrier_with_too_many_arrivals, 32, 0) {
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 31);
  mbarrier_expect_tx(&barrier[0], 16);  // keeps the phase open
  mbarrier_arrive(&barrier[0]);
}

KERNEL(mbarrier_never_completed, 64, 0) {
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 64);
  if (threadIdx.x < 32) mbarrier_arrive(&barrier[0]);
  mbarrier_wait(&barrier[0], 0);
}

// ---- the asynchronous proxy

KERNEL(load_without_fence_mbarrier_init, 32, 0) {
  FASTATTN_SHARED(values, uint4[4]);
  FASTATTN_SHARED(barrier, uint64_t[1]);
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier[0], 1);
    mbarrier_arrive_expect_tx(&barrier[0], 64);
    bulk_load(values, data, 64, &barrier[0]);
  }
  __syncthreads();
  mbarrier_wait(&barrier[0], 0);
}

KERNEL(load_nobody_waits_for, 32, 0) {
  FASTATTN_SHARED(values, uint4[4]);
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&barrier[0], 64);
    bulk_load(values, data, 64, &barrier[0]);
  }
}

KERNEL(load_over_stores_without_fence_proxy, 32, 0) {
  FASTATTN_SHARED(values, uint4[4]);
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 1);
  if (threadIdx.x < 16) reinterpret_cast<float*>(values)[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&barrier[0], 64);
    bulk_load(values, data, 64, &barrier[0]);
  }
  mbarrier_wait(&barrier[0], 0);
}

KERNEL(store_without_fence_proxy, 32, 0) {
  FASTATTN_SHARED(values, uint4[8]);
  reinterpret_cast<float*>(values)[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(data, values, 128);
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}

KERNEL(source_changed_before_the_store_read_it, 32, 0) {
  FASTATTN_SHARED(values, uint4[8]);
  auto* floats = reinterpret_cast<float*>(values);
  floats[threadIdx.x] = 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(data, values, 128);
    bulk_commit_group();
  }
  __syncthreads();
  floats[threadIdx.x] = 2.0f;
  __syncthreads();
  if (threadIdx.x == 0) bulk_wait_group<0>();
}

KERNEL(exit_while_a_store_reads, 32, 0) {
  FASTATTN_SHARED(values, uint4[8]);
  reinterpret_cast<float*>(values)[threadIdx.x] = 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(data, values, 128);
    bulk_commit_group();
  }
}

KERNEL(turn_passed_while_a_store_writes, 32, 0) {
  FASTATTN_SHARED(values, uint4[8]);
  reinterpret_cast<float*>(values)[threadIdx.x] = 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(data, values, 128);
    bulk_commit_group();
    bulk_wait_group_read<0>();
    pass_turn(reinterpret_cast<int*>(data) + 60);
    bulk_wait_group<0>();
  }
}

KERNEL(denormals_added_in_bulk, 32, 0) {  // no error: they become 0
  FASTATTN_SHARED(values, float4[8]);
  reinterpret_cast<float*>(values)[threadIdx.x] = 0x1p-127f;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_reduce_add(data, reinterpret_cast<float*>(values), 128);
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}

// `data` as 4 rows of 16 columns, of which a copy takes one.
#define KERNEL_WITH_MAP(name, swizzle)                                                            \
  __global__ void name##_kernel(const __grid_constant__ TensorMap map);                           \
  extern "C" const char* misuse_##name(float* data, int, void* stream) {                          \
    TensorMap map;                                                                                \
    const char* error = make_tensor_map<float, 2>(map, data, {16, 4}, {1, 16}, {16, 1}, swizzle); \
    if (error != nullptr) return error;                                                           \
    return launch_kernel(name##_kernel, 1, 32, 1024, static_cast<cudaStream_t>(stream), map);     \
  }                                                                                               \
  __global__ void name##_kernel(const __grid_constant__ TensorMap map)

KERNEL_WITH_MAP(store_before_the_start, Swizzle::kNone) {
  FASTATTN_DYNAMIC_SMEM(smem);
  if (threadIdx.x == 0) {
    tma_store(&map, smem, {-4, 0});
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}

KERNEL_WITH_MAP(rows_shorter_than_the_swizzle, Swizzle::k128) {
  FASTATTN_DYNAMIC_SMEM(smem);
  if (threadIdx.x == 0) {
    tma_store(&map, smem, {0, 0});
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}

KERNEL(store_async_without_a_cluster, 32, 0) {
  FASTATTN_SHARED(word, uint32_t[1]);
  FASTATTN_SHARED(barrier, uint64_t[1]);
  init_barrier(&barrier[0], 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&barrier[0], 4);
    store_async(smem_address(word), {1u}, smem_address(&barrier[0]));
  }
  mbarrier_wait_cluster(&barrier[0], 0);
}

// ---- wgmma on tiles of zeros: 64 x 16 and 16 x 16 bf16, no swizzle

__device__ inline void zero_tiles(uint8_t* smem) {
  for (int i = threadIdx.x; i < 2560 / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(smem)[i] = 0;
  fence_proxy_async();
  __syncthreads();
}

__device__ inline void issue_product(float (&d)[8], const uint8_t* smem) {
  const uint64_t a = wgmma_descriptor(smem_address(smem), 1024, 128, Swizzle::kNone);
  const uint64_t b = wgmma_descriptor(smem_address(smem) + 2048, 256, 128, Swizzle::kNone);
  wgmma_m64k16<bfloat16_t>(d, a, b, true);
}

KERNEL(wgmma_without_fence, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  issue_product(d, smem);
  wgmma_commit_group();
  wgmma_wait_group<0>();
}

KERNEL(wgmma_not_waited_for, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
}

KERNEL(accumulator_changed_in_flight, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
  d[3] *= 0.5f;
  wgmma_wait_group<0>();
}

KERNEL(accumulator_read_in_flight, 128, 2560) {  // no error: NaN
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
  if (threadIdx.x < 32) data[threadIdx.x] = d[0];
  wgmma_wait_group<0>();
}

KERNEL(tile_changed_in_flight, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
  __syncthreads();
  smem[threadIdx.x] = 1;
  wgmma_wait_group<0>();
}

KERNEL(warps_of_a_warpgroup_disagree, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  for (int i = 0; i < (threadIdx.x < 32 ? 2 : 1); ++i) {
    wgmma_fence();
    issue_product(d, smem);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
}

KERNEL(warps_of_a_warpgroup_wait_differently, 128, 2560) {
  FASTATTN_DYNAMIC_SMEM(smem);
  zero_tiles(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
  if (threadIdx.x < 32) wgmma_wait_group<0>();
  wgmma_wait_group<0>();
}

KERNEL(descriptor_outside_shared, 128, 1024) {
  FASTATTN_DYNAMIC_SMEM(smem);
  float d[8] = {};
  wgmma_fence();
  issue_product(d, smem);
  wgmma_commit_group();
  wgmma_wait_group<0>();
}

// ---- registers: three warpgroups have 168 a thread

KERNEL(more_registers_than_were_given_back, 384, 0) {
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
  } else {
    setmaxnreg_inc<240>();
  }
}

KERNEL(setmaxnreg_by_one_warp, 384, 0) {
  if (threadIdx.x < 32) setmaxnreg_dec<40>();
}

// ---- launches

__global__ void empty_kernel() {}
template <int kWhich>
__global__ void static_shared_kernel(int* unused) {
  FASTATTN_SHARED(numbers, int[32]);
  numbers[threadIdx.x % 32] = 0;
  if (unused != nullptr) *unused = numbers[0];
}
extern "C" const char* misuse_launch(int threads, int blocks_y, int smem_bytes, void* stream) {
  return launch_kernel(empty_kernel, dim3(1, blocks_y), threads, static_cast<size_t>(smem_bytes),
                       static_cast<cudaStream_t>(stream));
}

// 128 bytes of static shared memory, and so much dynamic: by one kernel if that is even, else by another, since a
// kernel asks for one size only.
extern "C" const char* misuse_static_shared(int smem_bytes, void* stream) {
  return launch_choice<0, 1>(smem_bytes % 2, [&](auto which) {
    return launch_kernel(static_shared_kernel<which()>, 1, 32, static_cast<size_t>(smem_bytes),
                         static_cast<cudaStream_t>(stream), static_cast<int*>(nullptr));
  });
}
