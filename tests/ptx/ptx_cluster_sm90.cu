// One small kernel for each wrapper of common/ptx_cluster.cuh; see ptx_sm80.cu. Blocks of 64 threads.
#include "common/launch.cuh"
#include "common/ptx_cluster.cuh"

using namespace fastattn;

static cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

constexpr int kThreads = 64;

// ---- ranks: out (blocks, 2), by blockIdx, x fastest

__global__ void rank_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (threadIdx.x != 0) return;
  out[2 * block] = static_cast<int>(cluster_rank());
  out[2 * block + 1] = static_cast<int>(cluster_blocks());
}
extern "C" const char* ptx_cluster_rank(int* out, const uint32_t* grid, const uint32_t* cluster, void* stream) {
  return launch_clusters(rank_kernel, dim3(grid[0], grid[1], grid[2]), dim3(cluster[0], cluster[1], cluster[2]),
                         kThreads, 0, stream_of(stream), out);
}

// ---- loads and stores: every block reads kWords of its right neighbour's memory, and stores to that of its left one

template <int kWords>
__global__ void exchange_kernel(const uint32_t* in, uint32_t* loaded, uint32_t* stored) {
  FASTATTN_SHARED(own, uint4[kThreads]);
  FASTATTN_DYNAMIC_SMEM(smem);
  auto* inbox = reinterpret_cast<uint4*>(smem);
  const uint32_t blocks = cluster_blocks(), rank = cluster_rank();
  const uint32_t right = (rank + 1) % blocks, left = (rank + blocks - 1) % blocks;
  const int thread = static_cast<int>(threadIdx.x), index = (static_cast<int>(blockIdx.x) * kThreads + thread) * kWords;
  uint32_t value[kWords];
  for (int i = 0; i < kWords; ++i) value[i] = in[index + i];
  store_cluster(smem_address(&own[thread]), value);  // an own address is one of the cluster's as well
  cluster_arrive();
  cluster_wait();
  const int from = kThreads - 1 - thread;
  load_cluster(value, cluster_address(smem_address(&own[from]), right));
  for (int i = 0; i < kWords; ++i) loaded[index + i] = value[i];
  store_cluster(cluster_address(smem_address(&inbox[thread]), left), value);
  cluster_arrive();
  cluster_wait();
  const auto* words = reinterpret_cast<const uint32_t*>(&inbox[thread]);
  for (int i = 0; i < kWords; ++i) stored[index + i] = words[i];
}
extern "C" const char* ptx_cluster_exchange(const uint32_t* in, uint32_t* loaded, uint32_t* stored, int words,
                                            int blocks, int cluster, void* stream) {
  const auto kernel = words == 1 ? exchange_kernel<1> : words == 2 ? exchange_kernel<2> : exchange_kernel<4>;
  return launch_clusters(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(cluster), kThreads, 16 * kThreads,
                         stream_of(stream), in, loaded, stored);
}

// ---- st.async: in every round each block sends kWords of each thread to all blocks, which wait for all that they get

template <int kWords>
__global__ void store_async_kernel(const uint32_t* in, uint32_t* out, int rounds) {
  FASTATTN_DYNAMIC_SMEM(smem);
  FASTATTN_SHARED(arrived, uint64_t[2]);
  auto* inbox = reinterpret_cast<uint4*>(smem);  // (2, blocks, threads)
  const int blocks = static_cast<int>(cluster_blocks()), rank = static_cast<int>(cluster_rank());
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(gridDim.x) * kThreads * kWords;
  if (thread == 0) {
    mbarrier_init(&arrived[0], 1);
    mbarrier_init(&arrived[1], 1);
    fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const int half = round % 2, index = (static_cast<int>(blockIdx.x) * kThreads + thread) * kWords;
    uint32_t value[kWords];
    for (int i = 0; i < kWords; ++i) value[i] = in[round * count + index + i];
    for (int to = 0; to < blocks; ++to) {
      const uint4* slot = &inbox[(half * blocks + rank) * kThreads + thread];
      store_async(cluster_address(smem_address(slot), to), value, cluster_address(smem_address(&arrived[half]), to));
    }
    if (thread == 0) mbarrier_arrive_expect_tx(&arrived[half], blocks * kThreads * kWords * 4);
    mbarrier_wait_cluster(&arrived[half], round / 2 % 2);
    for (int i = 0; i < kWords; ++i) value[i] = 0;
    for (int from = 0; from < blocks; ++from) {
      const auto* words = reinterpret_cast<const uint32_t*>(&inbox[(half * blocks + from) * kThreads + thread]);
      for (int i = 0; i < kWords; ++i) value[i] = value[i] * 3 + words[i];
    }
    for (int i = 0; i < kWords; ++i) out[round * count + index + i] = value[i];
    __syncthreads();  // this half was read; nobody sends to it again before this block has sent the other half
  }
}
extern "C" const char* ptx_store_async(const uint32_t* in, uint32_t* out, int words, int rounds, int blocks,
                                       int cluster, void* stream) {
  const auto kernel = words == 1 ? store_async_kernel<1> : words == 2 ? store_async_kernel<2> : store_async_kernel<4>;
  return launch_clusters(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(cluster), kThreads,
                         static_cast<size_t>(2 * cluster) * kThreads * 16, stream_of(stream), in, out, rounds);
}

// ---- remote arrivals: rank 0 gives a number to each of the others in turn, in one slot of theirs; they say when it is
// read. out (blocks, rounds)

__global__ void ring_kernel(const int* in, int* out, int rounds) {
  FASTATTN_SHARED(full, uint64_t[1]);
  FASTATTN_SHARED(empty, uint64_t[1]);
  FASTATTN_SHARED(slot, uint32_t[1]);
  const uint32_t blocks = cluster_blocks(), rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&empty[0], static_cast<int>(blocks) - 1);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    for (int round = 0; round < rounds; ++round) {
      if (rank == 0) {
        mbarrier_wait_cluster(&empty[0], round % 2 ^ 1);
        for (uint32_t to = 1; to < blocks; ++to) {
          const uint32_t value[1] = {static_cast<uint32_t>(in[round]) + to};
          store_cluster(cluster_address(smem_address(&slot[0]), to), value);
          mbarrier_arrive_cluster(cluster_address(smem_address(&full[0]), to));
        }
      } else {
        mbarrier_wait_cluster(&full[0], round % 2);
        out[static_cast<int>(blockIdx.x) * rounds + round] = static_cast<int>(slot[0]);
        mbarrier_arrive_cluster(cluster_address(smem_address(&empty[0]), 0));
      }
    }
  }
  __syncwarp();
  cluster_arrive();  // rank 0 is still written to
  cluster_wait();
}
extern "C" const char* ptx_cluster_ring(const int* in, int* out, int rounds, int blocks, int cluster, void* stream) {
  return launch_clusters(ring_kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(cluster), kThreads, 0,
                         stream_of(stream), in, out, rounds);
}
