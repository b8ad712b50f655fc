// A warp-specialised matrix product of compute capability 9.0: C (m, n) = A (m, k) B (n, k)^T in bf16, right as it
// stands and with one thing left out at a time (Bug). Warp 4 loads tiles by TMA into a ring of two stages; warps 0 to 3
// are the consumer warpgroup, and write their tile of C through shared memory and a TMA store.
#include "common/launch.cuh"
#include "common/ptx_wgmma.cuh"
#include "common/vec.cuh"

using namespace fastattn;

enum class Bug : int {
  kNone,
  kNoFullWait,     // consumers do not wait for the tiles
  kNoEmptyWait,    // the producer does not wait until a stage is free
  kNoRelease,      // consumers never free a stage
  kEarlyRelease,   // consumers free a stage whose products are in flight
  kWrongBytes,     // the producer expects 16 bytes too many
  kNoInitBarrier,  // nobody waits for the initialisation of the mbarriers
  kNoWgmmaWait,    // the accumulators are read in flight
  kNoWgmmaFence,
  kAccumulatorTouched,    // scaled while in flight
  kNoProxyFence,          // C is in shared memory, but not for the asynchronous proxy
  kNoBarrierBeforeStore,  // the store starts when the first warp is ready
  kNoStoreWait,           // the block ends while its store reads shared memory
  kStageOverrun,          // the ring is indexed one stage too far
};

constexpr int kTile = 64, kStages = 2, kTileBytes = kTile * kTile * 2;

struct __align__(1024) Smem {
  bfloat16_t a[kStages][kTile * kTile];
  bfloat16_t b[kStages][kTile * kTile];
  bfloat16_t c[kTile * kTile];
  uint64_t full[kStages], empty[kStages];
};

template <Bug kBug>
__device__ inline void produce(Smem& smem, const TensorMap* a_map, const TensorMap* b_map, int steps) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    const int target = kBug == Bug::kStageOverrun ? step % (kStages + 1) : stage;
    if constexpr (kBug != Bug::kNoEmptyWait) mbarrier_wait(&smem.empty[stage], parity ^ 1);
    mbarrier_arrive_expect_tx(&smem.full[stage], 2 * kTileBytes + (kBug == Bug::kWrongBytes ? 16 : 0));
    tma_load(smem.a[0] + target * kTile * kTile, a_map, &smem.full[stage], {step * kTile, int(blockIdx.y) * kTile});
    tma_load(smem.b[0] + target * kTile * kTile, b_map, &smem.full[stage], {step * kTile, int(blockIdx.x) * kTile});
  }
}

template <Bug kBug>
__device__ inline void consume(float (&d)[kTile / 2], Smem& smem, int steps) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    if constexpr (kBug != Bug::kNoFullWait) mbarrier_wait(&smem.full[stage], parity);
    const uint64_t a = wgmma_descriptor(smem_address(smem.a[stage]), 16, 1024, Swizzle::k128);
    const uint64_t b = wgmma_descriptor(smem_address(smem.b[stage]), 16, 1024, Swizzle::k128);
    if constexpr (kBug != Bug::kNoWgmmaFence) wgmma_fence();
    for (int k = 0; k < kTile / 16; ++k) {
      wgmma_m64k16<bfloat16_t>(d, advance_descriptor(a, 32 * k), advance_descriptor(b, 32 * k), step + k > 0);
    }
    wgmma_commit_group();
    const bool releases = kBug != Bug::kNoRelease && threadIdx.x % 32 == 0;
    if (kBug == Bug::kEarlyRelease && releases) mbarrier_arrive(&smem.empty[stage]);
    if constexpr (kBug == Bug::kAccumulatorTouched) d[5] *= 2.0f;
    if constexpr (kBug != Bug::kNoWgmmaWait) wgmma_wait_group<0>();
    if (kBug != Bug::kEarlyRelease && releases) mbarrier_arrive(&smem.empty[stage]);
  }
  pin_accumulators(d);
}

template <Bug kBug>
__device__ inline void write_out(const float (&d)[kTile / 2], Smem& smem, const TensorMap* c_map) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t c_smem = smem_address(smem.c);
  for (int i = 0; i < kTile / 16; ++i) {  // 16 x 16 elements of this warp's rows at a time
    const uint32_t quad[4] = {pack2<bfloat16_t>(d[8 * i], d[8 * i + 1]), pack2<bfloat16_t>(d[8 * i + 2], d[8 * i + 3]),
                              pack2<bfloat16_t>(d[8 * i + 4], d[8 * i + 5]),
                              pack2<bfloat16_t>(d[8 * i + 6], d[8 * i + 7])};
    const int row = warp * 16 + lane % 16, chunk = 2 * i + lane / 16;
    stmatrix(c_smem + row * 128 + ((chunk ^ (row & 7)) << 4), quad);
  }
  if constexpr (kBug != Bug::kNoProxyFence) fence_proxy_async();
  if constexpr (kBug != Bug::kNoBarrierBeforeStore) bar_sync(1, 128);
  if (threadIdx.x == 0) {
    tma_store(c_map, smem.c, {int(blockIdx.x) * kTile, int(blockIdx.y) * kTile});
    bulk_commit_group();
    if constexpr (kBug != Bug::kNoStoreWait) bulk_wait_group_read<0>();
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(160)
    matmul_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                  const __grid_constant__ TensorMap c_map, int steps) {
  FASTATTN_DYNAMIC_SMEM(bytes);
  Smem& smem = *reinterpret_cast<Smem*>(bytes);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&smem.full[stage], 1);
      mbarrier_init(&smem.empty[stage], 4);
    }
    fence_mbarrier_init();
  }
  if constexpr (kBug != Bug::kNoInitBarrier) __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) produce<kBug>(smem, &a_map, &b_map, steps);
  } else {
    float d[kTile / 2];
    for (float& sum : d) sum = 0.0f;
    consume<kBug>(d, smem, steps);
    write_out<kBug>(d, smem, &c_map);
  }
}

template <Bug kBug>
static const char* run_matmul(const void* a, const void* b, void* c, int m, int n, int k, void* stream) {
  TensorMap maps[3];
  const void* bases[3] = {a, b, c};
  const uint64_t rows[3] = {uint64_t(m), uint64_t(n), uint64_t(m)},
                 columns[3] = {uint64_t(k), uint64_t(k), uint64_t(n)};
  for (int i = 0; i < 3; ++i) {
    const uint64_t dim[2] = {columns[i], rows[i]}, stride[2] = {1, columns[i]};
    const uint32_t box[2] = {kTile, kTile};
    const char* error =
        make_tensor_map(maps[i], static_cast<const bfloat16_t*>(bases[i]), dim, stride, box, Swizzle::k128);
    if (error != nullptr) return error;
  }
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  return launch_kernel(matmul_kernel<kBug>, grid, 160, sizeof(Smem), static_cast<cudaStream_t>(stream), maps[0],
                       maps[1], maps[2], (k + kTile - 1) / kTile);
}

template <int kBug = 0>
static const char* run_matmul_with(int bug, const void* a, const void* b, void* c, int m, int n, int k, void* stream) {
  if (bug == kBug) return run_matmul<static_cast<Bug>(kBug)>(a, b, c, m, n, k, stream);
  if constexpr (kBug < static_cast<int>(Bug::kStageOverrun)) {
    return run_matmul_with<kBug + 1>(bug, a, b, c, m, n, k, stream);
  }
  return "bugs_matmul: no such bug";
}
extern "C" const char* bugs_matmul(const void* a, const void* b, void* c, int m, int n, int k, int bug, void* stream) {
  return run_matmul_with(bug, a, b, c, m, n, k, stream);
}
