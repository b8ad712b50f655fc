// Rows that a cluster of four blocks shares: out = x - mean of the row, right as it stands and with one thing wrong at
// a time (Bug). The blocks tell each other their sums either by loads from each other's shared memory, between barriers
// of the cluster, or by asynchronous stores, each block waiting for those that it gets.
#include "common/launch.cuh"
#include "common/ptx_cluster.cuh"
#include "common/reduce.cuh"

using namespace fastattn;

enum class Bug : int {
  kNone,
  // loads
  kNoStartBarrier,  // also of the stores: nobody waits until the other blocks have started
  kNoBarrierBeforeLoad,
  kNoBarrierBeforeReuse,  // the next row's sum overwrites one that others still read
  kNoBarrierBeforeExit,   // a block exits while others still read its sum
  kOneWarpAtTheBarrier,   // the others never arrive
  // stores
  kNoInitFence,      // the mbarriers are unknown to the other blocks
  kNoWait,           // nobody waits for the sums
  kOneSlot,          // all blocks store to the same place
  kOneBuffer,        // the next row's sums overwrite those that are still read
  kTooFewBytes,      // the mbarrier expects one block less
  kTooManyBytes,     // ... and one more than there are
  kOwnBarrier,       // completes the bytes at its own mbarrier instead of the receiver's
  kPastTheEnd,       // stores behind the receiver's shared memory
  kNoSuchRank,       // asks for a block that the cluster does not have
  kUnmappedAddress,  // everybody stores to itself
};

constexpr int kThreads = 64, kBlocks = 4;

// Sums of the block's part; the barriers also separate one row from the next.
__device__ inline float sum_of_part(const float* x, int columns, float (&scratch)[2]) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += kThreads) sum += x[i];
  return block_reduce<2>(sum, Sum{}, scratch);
}

__device__ inline void write_part(const float* x, float* out, int columns, float mean) {
  for (int i = threadIdx.x; i < columns; i += kThreads) out[i] = x[i] - mean;
}

template <Bug kBug>
__global__ void loads_kernel(const float* x, float* out, int rows, int columns) {
  FASTATTN_SHARED(scratch, float[2]);
  FASTATTN_SHARED(own, float[1]);
  const int part = columns / kBlocks, offset = static_cast<int>(cluster_rank()) * part;
  if constexpr (kBug != Bug::kNoStartBarrier) {
    cluster_arrive();
    cluster_wait();
  }
  for (int row = 0; row < rows; ++row) {
    const float sum = sum_of_part(x + row * columns + offset, part, scratch);
    if (threadIdx.x == 0) own[0] = sum;
    if (kBug == Bug::kNoStartBarrier || kBug == Bug::kNoBarrierBeforeLoad) {
      __syncthreads();
    } else if (kBug != Bug::kOneWarpAtTheBarrier || threadIdx.x < 32) {
      cluster_arrive();
      cluster_wait();
    }
    float total = 0.0f;
    for (uint32_t rank = 0; rank < kBlocks; ++rank) {
      uint32_t bits[1];
      load_cluster(bits, cluster_address(smem_address(&own[0]), rank));
      total += __int_as_float(static_cast<int>(bits[0]));
    }
    const bool last = row + 1 == rows;
    if (kBug != Bug::kNoBarrierBeforeExit && last) {
      cluster_arrive();
      cluster_wait();
    }
    if (kBug != Bug::kNoBarrierBeforeReuse && !last) {
      cluster_arrive();
      cluster_wait();
    }
    write_part(x + row * columns + offset, out + row * columns + offset, part, total / columns);
  }
}

struct Inbox {
  float sum[2][kBlocks];
  uint64_t arrived[2];
};

template <Bug kBug>
__device__ inline void send_sum(Inbox& inbox, float sum, int half) {
  const int rank = static_cast<int>(cluster_rank()), to = static_cast<int>(threadIdx.x);
  if (to >= kBlocks) return;
  const uint32_t slot = smem_address(&inbox.sum[half][kBug == Bug::kOneSlot ? 0 : rank]);
  const uint32_t barrier = smem_address(&inbox.arrived[half]);
  const uint32_t value[1] = {static_cast<uint32_t>(__float_as_int(sum))};
  if constexpr (kBug == Bug::kUnmappedAddress) return store_async(slot, value, barrier);
  const uint32_t receiver = kBug == Bug::kNoSuchRank ? to + 1 : to;
  store_async(cluster_address(slot, receiver) + (kBug == Bug::kPastTheEnd ? 1 << 18 : 0), value,
              cluster_address(barrier, kBug == Bug::kOwnBarrier ? rank : receiver));
}

template <Bug kBug>
__global__ void stores_kernel(const float* x, float* out, int rows, int columns) {
  FASTATTN_SHARED(scratch, float[2]);
  FASTATTN_SHARED(inbox, Inbox);
  const int part = columns / kBlocks, offset = static_cast<int>(cluster_rank()) * part;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : inbox.arrived) mbarrier_init(&barrier, 1);
    if constexpr (kBug != Bug::kNoInitFence) fence_mbarrier_init();
  }
  __syncthreads();
  if constexpr (kBug != Bug::kNoStartBarrier) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
  constexpr int kSenders = kBlocks + (kBug == Bug::kTooManyBytes ? 1 : 0) - (kBug == Bug::kTooFewBytes ? 1 : 0);
  for (int row = 0; row < rows; ++row) {
    const int half = kBug == Bug::kOneBuffer ? 0 : row % 2, parity = kBug == Bug::kOneBuffer ? row % 2 : row / 2 % 2;
    const float sum = sum_of_part(x + row * columns + offset, part, scratch);
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&inbox.arrived[half], kSenders * sizeof(float));
    send_sum<kBug>(inbox, sum, half);
    if constexpr (kBug != Bug::kNoWait) mbarrier_wait_cluster(&inbox.arrived[half], parity);
    float total = 0.0f;
    for (int rank = 0; rank < kBlocks; ++rank) total += inbox.sum[half][rank];
    write_part(x + row * columns + offset, out + row * columns + offset, part, total / columns);
  }
  if constexpr (kBug == Bug::kNoWait) {  // not the bug meant here
    cluster_arrive();
    cluster_wait();
  }
}

template <int kBug = 0>
static const char* run_with(bool loads, int bug, const float* x, float* out, int rows, int columns, void* stream) {
  if (bug == kBug) {
    const auto kernel = loads ? loads_kernel<static_cast<Bug>(kBug)> : stores_kernel<static_cast<Bug>(kBug)>;
    return launch_clusters(kernel, kBlocks, kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream), x, out, rows,
                           columns);
  }
  if constexpr (kBug < static_cast<int>(Bug::kUnmappedAddress)) {
    return run_with<kBug + 1>(loads, bug, x, out, rows, columns, stream);
  }
  return "bugs_cluster: no such bug";
}
extern "C" const char* bugs_cluster_loads(const float* x, float* out, int rows, int columns, int bug, void* stream) {
  return run_with(true, bug, x, out, rows, columns, stream);
}
extern "C" const char* bugs_cluster_stores(const float* x, float* out, int rows, int columns, int bug, void* stream) {
  return run_with(false, bug, x, out, rows, columns, stream);
}
