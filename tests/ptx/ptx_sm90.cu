// One small kernel for each wrapper of common/ptx_sm90.cuh and ptx_wgmma.cuh; see ptx_sm80.cu.
#include "common/launch.cuh"
#include "common/ptx_wgmma.cuh"

using namespace fastattn;

static cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// ---- stmatrix: in (32 lanes, kMatrices registers), out (32 rows, 8 elements)

template <int kMatrices, bool kTrans>
__global__ void stmatrix_kernel(const uint32_t* in, uint16_t* out) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x;
  auto* rows = reinterpret_cast<uint16_t*>(smem);
  uint32_t registers[kMatrices];
  for (int i = 0; i < kMatrices; ++i) registers[i] = in[lane * kMatrices + i];
  const uint32_t row_smem = smem_address(rows + 8 * lane);
  if constexpr (kTrans) {
    stmatrix_trans(row_smem, registers);
  } else {
    stmatrix(row_smem, registers);
  }
  __syncwarp();
  for (int i = lane; i < 64 * kMatrices; i += 32) out[i] = rows[i];
}
template <int kMatrices>
static const char* run_stmatrix(const uint32_t* in, uint16_t* out, bool trans, void* stream) {
  if (trans) return launch_kernel(stmatrix_kernel<kMatrices, true>, 1, 32, 512, stream_of(stream), in, out);
  return launch_kernel(stmatrix_kernel<kMatrices, false>, 1, 32, 512, stream_of(stream), in, out);
}
extern "C" const char* ptx_stmatrix(const uint32_t* in, uint16_t* out, int matrices, int trans, void* stream) {
  if (matrices == 2) return run_stmatrix<2>(in, out, trans != 0, stream);
  return run_stmatrix<4>(in, out, trans != 0, stream);
}

// ---- elect.sync, setmaxnreg: out (256): 1 for elected threads

__global__ void __launch_bounds__(256, 1) elect_kernel(int* out) {
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
  } else {
    setmaxnreg_inc<232>();
  }
  out[threadIdx.x] = elect_sync() ? 1 : 0;
}
extern "C" const char* ptx_elect(int* out, void* stream) {
  return launch_kernel(elect_kernel, 1, 256, 0, stream_of(stream), out);
}

// ---- mbarriers: warp 0 produces with ordinary stores, warps 1 to 3 consume; two stages, so parities alternate

__global__ void mbarrier_kernel(const int* in, int* out, int rounds) {
  FASTATTN_SHARED(full, uint64_t[2]);
  FASTATTN_SHARED(empty, uint64_t[2]);
  FASTATTN_SHARED(values, int[2][32]);
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(&full[stage], 32);
      mbarrier_init(&empty[stage], 96);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % 2, parity = round / 2 % 2;
    if (thread < 32) {
      mbarrier_wait(&empty[stage], parity ^ 1);
      values[stage][lane] = in[round * 32 + lane];
      mbarrier_arrive(&full[stage]);
    } else {
      mbarrier_wait(&full[stage], parity);
      out[round * 96 + thread - 32] = values[stage][31 - lane];
      mbarrier_arrive(&empty[stage]);
    }
  }
  __syncthreads();
  if (thread == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_inval(&full[stage]);
      mbarrier_inval(&empty[stage]);
    }
  }
}
extern "C" const char* ptx_mbarrier(const int* in, int* out, int rounds, void* stream) {
  return launch_kernel(mbarrier_kernel, 1, 128, 0, stream_of(stream), in, out, rounds);
}

// Warp 0 copies with cp.async, whose completion arrives at the barrier; warp 1 reads.
__global__ void cp_async_arrive_kernel(const uint4* in, uint4* out) {
  FASTATTN_SHARED(landed, uint64_t[1]);
  FASTATTN_SHARED(values, uint4[64]);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(&landed[0], 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread < 32) {
    for (int i = thread; i < 64; i += 32) cp_async<16>(smem_address(&values[i]), in + i);
    cp_async_mbarrier_arrive_noinc(&landed[0]);
  } else {
    mbarrier_wait(&landed[0], 0);
    for (int i = thread - 32; i < 64; i += 32) out[i] = values[63 - i];
  }
}
extern "C" const char* ptx_cp_async_arrive(const uint4* in, uint4* out, void* stream) {
  return launch_kernel(cp_async_arrive_kernel, 1, 64, 0, stream_of(stream), in, out);
}

// ---- TMA: a box is loaded and written out raw; then stored, or added, at another place of another tensor

struct TmaShape {
  uint64_t dim[5];
  uint64_t stride[5];
  uint32_t box[5];
  int32_t load_at[5];
  int32_t store_at[5];
};

template <typename Element, int kRank>
__global__ void tma_kernel(const __grid_constant__ TensorMap source, const __grid_constant__ TensorMap destination,
                           const TmaShape shape, uint8_t* image, uint32_t bytes, int adds) {
  FASTATTN_DYNAMIC_SMEM(smem);
  FASTATTN_SHARED(loaded, uint64_t[1]);
  int32_t load_at[kRank], store_at[kRank];
  for (int i = 0; i < kRank; ++i) {
    load_at[i] = shape.load_at[i];
    store_at[i] = shape.store_at[i];
  }
  auto* tile = smem + (1024 - smem_address(smem) % 1024) % 1024;  // the static array comes first
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&source);
    mbarrier_init(&loaded[0], 1);
    fence_mbarrier_init();
    mbarrier_expect_tx(&loaded[0], bytes);
    tma_load(tile, &source, &loaded[0], load_at);
    mbarrier_arrive(&loaded[0]);
  }
  __syncthreads();
  mbarrier_wait(&loaded[0], 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) image[i] = tile[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (adds != 0) {
      tma_reduce_add(&destination, tile, store_at);
    } else {
      tma_store(&destination, tile, store_at);
    }
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}
template <typename Element, int kRank>
static const char* run_tma(const void* source, void* destination, const TmaShape& shape, int swizzle, int adds,
                           uint8_t* image, void* stream) {
  uint64_t dim[kRank], stride[kRank];
  uint32_t box[kRank], bytes = sizeof(Element);
  for (int i = 0; i < kRank; ++i) {
    dim[i] = shape.dim[i];
    stride[i] = shape.stride[i];
    box[i] = shape.box[i];
    bytes *= box[i];
  }
  TensorMap source_map, destination_map;
  const auto kind = static_cast<Swizzle>(swizzle);
  const char* error = make_tensor_map(source_map, static_cast<const Element*>(source), dim, stride, box, kind);
  if (error == nullptr) {
    error = make_tensor_map(destination_map, static_cast<const Element*>(destination), dim, stride, box, kind);
  }
  if (error != nullptr) return error;
  return launch_kernel(tma_kernel<Element, kRank>, 1, 64, bytes + 1024, stream_of(stream), source_map, destination_map,
                       shape, image, bytes, adds);
}
template <typename Element>
static const char* run_tma_rank(int rank, const void* source, void* destination, const TmaShape& shape, int swizzle,
                                int adds, uint8_t* image, void* stream) {
  switch (rank) {
    case 1:
      return run_tma<Element, 1>(source, destination, shape, swizzle, adds, image, stream);
    case 2:
      return run_tma<Element, 2>(source, destination, shape, swizzle, adds, image, stream);
    case 3:
      return run_tma<Element, 3>(source, destination, shape, swizzle, adds, image, stream);
    case 4:
      return run_tma<Element, 4>(source, destination, shape, swizzle, adds, image, stream);
    default:
      return run_tma<Element, 5>(source, destination, shape, swizzle, adds, image, stream);
  }
}
// element: 0 float, 1 half_t, 2 bfloat16_t, 3 int32_t, 4 int8_t. `shape` is in host memory.
extern "C" const char* ptx_tma(const void* source, void* destination, const TmaShape* shape, int rank, int element,
                               int swizzle, int adds, uint8_t* image, void* stream) {
  switch (element) {
    case 0:
      return run_tma_rank<float>(rank, source, destination, *shape, swizzle, adds, image, stream);
    case 1:
      return run_tma_rank<half_t>(rank, source, destination, *shape, swizzle, adds, image, stream);
    case 2:
      return run_tma_rank<bfloat16_t>(rank, source, destination, *shape, swizzle, adds, image, stream);
    case 3:
      return run_tma_rank<int32_t>(rank, source, destination, *shape, swizzle, adds, image, stream);
    default:
      return run_tma_rank<int8_t>(rank, source, destination, *shape, swizzle, adds, image, stream);
  }
}

// ---- bulk copies of 64 floats: out = in, sum += in + 1 (changed in shared memory, so a proxy fence is needed)

__global__ void bulk_kernel(const float* in, float* out, float* sum) {
  FASTATTN_SHARED(values, uint4[16]);
  FASTATTN_SHARED(loaded, uint64_t[1]);
  auto* floats = reinterpret_cast<float*>(values);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(&loaded[0], 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&loaded[0], 256);
    bulk_load(values, in + 64 * blockIdx.x, 256, &loaded[0]);
  }
  __syncthreads();
  mbarrier_wait(&loaded[0], 0);
  if (thread == 0) {
    bulk_store(out + 64 * blockIdx.x, values, 256);
    bulk_commit_group();
    bulk_wait_group_read<0>();
  }
  __syncthreads();
  floats[thread] += 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    bulk_reduce_add(sum, floats, 256);
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}
extern "C" const char* ptx_bulk(const float* in, float* out, float* sum, int blocks, void* stream) {
  return launch_kernel(bulk_kernel, blocks, 64, 0, stream_of(stream), in, out, sum);
}

// ---- wgmma: shared memory is filled with `image`, in which the test has laid the tiles out; one product a step

// A K-major tile is a row of blocks as wide as the swizzle, each of `steps_per_block` products of 32 bytes of k.
struct WgmmaTile {
  uint32_t offset, leading_bytes, stride_bytes, step_bytes, steps_per_block, block_bytes;

  FASTATTN_DEVICE uint32_t bytes_to_step(uint32_t step) const {
    return step % steps_per_block * step_bytes + step / steps_per_block * block_bytes;
  }
};

template <typename Element, Major kMajorA, Major kMajorB, bool kARegisters, int kN>
__global__ void __launch_bounds__(128) wgmma_kernel(const uint8_t* image, uint32_t image_bytes, const uint32_t* a_rmem,
                                                    WgmmaTile a, WgmmaTile b, Swizzle swizzle, int steps, float* d) {
  constexpr bool kIsInt8 = std::is_same_v<Element, int8_t>;
  using Accumulator = std::conditional_t<kIsInt8, int32_t, float>;
  FASTATTN_DYNAMIC_SMEM(smem);
  for (uint32_t i = threadIdx.x * 16; i < image_bytes; i += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(smem + i) = *reinterpret_cast<const uint4*>(image + i);
  }
  fence_proxy_async();
  __syncthreads();
  Accumulator d_rmem[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d_rmem[i] = 0;
  const uint32_t base = smem_address(smem);
  const uint64_t a_desc = wgmma_descriptor(base + a.offset, a.leading_bytes, a.stride_bytes, swizzle);
  const uint64_t b_desc = wgmma_descriptor(base + b.offset, b.leading_bytes, b.stride_bytes, swizzle);
  for (int step = 0; step < steps; ++step) {
    const uint64_t a_step = advance_descriptor(a_desc, a.bytes_to_step(step));
    const uint64_t b_step = advance_descriptor(b_desc, b.bytes_to_step(step));
    wgmma_fence();
    if constexpr (kARegisters) {
      uint32_t fragment[4];
      for (int i = 0; i < 4; ++i) fragment[i] = a_rmem[(step * 128 + threadIdx.x) * 4 + i];
      if constexpr (kIsInt8) {
        wgmma_m64k32_s8(d_rmem, fragment, b_step, step > 0);
      } else {
        wgmma_m64k16<Element, kMajorB>(d_rmem, fragment, b_step, step > 0);
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
    } else {
      if constexpr (kIsInt8) {
        wgmma_m64k32_s8(d_rmem, a_step, b_step, step > 0);
      } else {
        wgmma_m64k16<Element, kMajorA, kMajorB>(d_rmem, a_step, b_step, step > 0);
      }
      wgmma_commit_group();
      wgmma_wait_group<1>();
    }
  }
  wgmma_wait_group<0>();
  pin_accumulators(d_rmem);
  for (int i = 0; i < kN / 2; ++i) d[threadIdx.x * (kN / 2) + i] = static_cast<float>(d_rmem[i]);
}

struct WgmmaCall {
  WgmmaTile a, b;
  uint32_t image_bytes;
  int swizzle, steps, a_in_registers, a_is_mn_major, b_is_mn_major;
};

template <typename Element, int kN, Major kMajorA, Major kMajorB>
static const char* run_wgmma(const uint8_t* image, const uint32_t* a_rmem, const WgmmaCall& call, float* d,
                             void* stream) {
  const auto swizzle = static_cast<Swizzle>(call.swizzle);
  const auto kernel = call.a_in_registers != 0 ? wgmma_kernel<Element, Major::kK, kMajorB, true, kN>
                                               : wgmma_kernel<Element, kMajorA, kMajorB, false, kN>;
  return launch_kernel(kernel, 1, 128, call.image_bytes, stream_of(stream), image, call.image_bytes, a_rmem, call.a,
                       call.b, swizzle, call.steps, d);
}
template <typename Element, int kN>
static const char* run_wgmma_majors(const uint8_t* image, const uint32_t* a_rmem, const WgmmaCall& call, float* d,
                                    void* stream) {
  if (call.a_is_mn_major != 0 && call.b_is_mn_major != 0) {
    return run_wgmma<Element, kN, Major::kMN, Major::kMN>(image, a_rmem, call, d, stream);
  }
  if (call.b_is_mn_major != 0) {
    return run_wgmma<Element, kN, Major::kK, Major::kMN>(image, a_rmem, call, d, stream);
  }
  return run_wgmma<Element, kN, Major::kK, Major::kK>(image, a_rmem, call, d, stream);
}
template <typename Element>
static const char* run_wgmma_n(int n, const uint8_t* image, const uint32_t* a_rmem, const WgmmaCall& call, float* d,
                               void* stream) {
  switch (n) {
    case 16:
      return run_wgmma_majors<Element, 16>(image, a_rmem, call, d, stream);
    case 64:
      return run_wgmma_majors<Element, 64>(image, a_rmem, call, d, stream);
    case 96:
      return run_wgmma_majors<Element, 96>(image, a_rmem, call, d, stream);
    case 256:
      return run_wgmma_majors<Element, 256>(image, a_rmem, call, d, stream);
    default:
      return "ptx_wgmma: N";
  }
}
// element: 1 half_t, 2 bfloat16_t, 4 int8_t. `call` is in host memory. d (128 threads, N / 2), int32 sums as floats.
extern "C" const char* ptx_wgmma(const uint8_t* image, const uint32_t* a_rmem, const WgmmaCall* call, int element,
                                 int n, float* d, void* stream) {
  if (element == 1) return run_wgmma_n<half_t>(n, image, a_rmem, *call, d, stream);
  if (element == 2) return run_wgmma_n<bfloat16_t>(n, image, a_rmem, *call, d, stream);
  switch (n) {
    case 16:
      return run_wgmma<int8_t, 16, Major::kK, Major::kK>(image, a_rmem, *call, d, stream);
    case 256:
      return run_wgmma<int8_t, 256, Major::kK, Major::kK>(image, a_rmem, *call, d, stream);
    default:
      return run_wgmma<int8_t, 64, Major::kK, Major::kK>(image, a_rmem, *call, d, stream);
  }
}
