// One small kernel for each wrapper of common/ptx.cuh, vec.cuh and reduce.cuh, and for the CUDA builtins that the
// emulator supplies. test_ptx.py runs them on the emulator, and the same file built by nvcc on a device. All pointers
// are global.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

using namespace fastattn;

static cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// ---- shuffles and votes: out (rows, 32), one row an instruction

__global__ void shuffle_kernel(const int* in, int* out, double* out_wide) {
  const int lane = threadIdx.x;
  const int value = in[lane];
  out[lane] = __shfl_sync(kFullWarp, value, lane * 7 + 3);
  out[32 + lane] = __shfl_up_sync(kFullWarp, value, 3);
  out[64 + lane] = __shfl_down_sync(kFullWarp, value, 5);
  out[96 + lane] = __shfl_xor_sync(kFullWarp, value, 9);
  out[128 + lane] = __shfl_sync(kFullWarp, value, lane + 1, 8);
  out[160 + lane] = __shfl_up_sync(kFullWarp, value, 2, 8);
  out[192 + lane] = __shfl_down_sync(kFullWarp, value, 3, 16);
  out_wide[lane] = __shfl_xor_sync(kFullWarp, value * 1e-9 + 1.0, 1);
}
extern "C" const char* ptx_shuffle(const int* in, int* out, double* out_wide, void* stream) {
  return launch_kernel(shuffle_kernel, 1, 32, 0, stream_of(stream), in, out, out_wide);
}

__global__ void vote_kernel(const int* in, int* out) {
  const int lane = threadIdx.x;
  const bool predicate = in[lane] != 0;
  const unsigned half_warp = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  out[lane] = static_cast<int>(__ballot_sync(kFullWarp, predicate));
  out[32 + lane] = __any_sync(kFullWarp, predicate) != 0;
  out[64 + lane] = __all_sync(kFullWarp, predicate) != 0;
  if (lane < 16) {
    out[96 + lane] = static_cast<int>(__ballot_sync(half_warp, predicate));
  } else {
    out[96 + lane] = __all_sync(half_warp, predicate) != 0;
  }
}
extern "C" const char* ptx_vote(const int* in, int* out, void* stream) {
  return launch_kernel(vote_kernel, 1, 32, 0, stream_of(stream), in, out);
}

// ---- barriers: every thread publishes a value and reads another thread's

__global__ void syncwarp_kernel(const int* in, int* out) {
  FASTATTN_SHARED(values, int[64]);
  const int thread = threadIdx.x, neighbour = thread ^ 31;
  values[thread] = in[thread];
  __syncwarp();
  out[thread] = values[neighbour];
}
extern "C" const char* ptx_syncwarp(const int* in, int* out, void* stream) {
  return launch_kernel(syncwarp_kernel, 1, 64, 0, stream_of(stream), in, out);
}

__global__ void syncthreads_kernel(const int* in, int* out) {
  FASTATTN_SHARED(values, int[256]);
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y;
  const int first = (blockIdx.x + gridDim.x * blockIdx.y) * threads;
  values[thread] = in[first + thread];
  __syncthreads();
  out[first + thread] = values[threads - 1 - thread];
}
extern "C" const char* ptx_syncthreads(const int* in, int* out, void* stream) {
  return launch_kernel(syncthreads_kernel, dim3(3, 2), dim3(64, 4), 0, stream_of(stream), in, out);
}

// Warps 0 and 1 produce, warps 2 and 3 consume, through named barriers: 1 = full, 2 = empty.
__global__ void named_barrier_kernel(const int* in, int* out, int rounds) {
  FASTATTN_SHARED(values, int[64]);
  const int thread = threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    if (thread < 64) {
      if (round > 0) bar_sync(2, 128);
      values[thread] = in[round * 64 + thread];
      bar_arrive(1, 128);
    } else {
      bar_sync(1, 128);
      out[round * 64 + thread - 64] = values[127 - thread];
      if (round + 1 < rounds) bar_arrive(2, 128);
    }
  }
}
extern "C" const char* ptx_named_barriers(const int* in, int* out, int rounds, void* stream) {
  return launch_kernel(named_barrier_kernel, 1, 128, 0, stream_of(stream), in, out, rounds);
}

// ---- atomics

__global__ void atomic_kernel(const int* in, int* sum, int* maximum, float* float_sum, int* turns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(sum, in[i]);
  atomicMax(maximum, in[i]);
  atomicAdd(float_sum, static_cast<float>(in[i] % 8));
  int seen = 0;  // a guess: a plain read would race
  for (int expected = seen; (seen = atomicCAS(turns, expected, expected + 1)) != expected;) expected = seen;
}
extern "C" const char* ptx_atomics(const int* in, int* sum, int* maximum, float* float_sum, int* turns, int blocks,
                                   void* stream) {
  return launch_kernel(atomic_kernel, blocks, 64, 0, stream_of(stream), in, sum, maximum, float_sum, turns);
}

// ---- cp.async: three groups of kBytes a thread, waited for one after another; odd threads copy zeros in group 1

template <int kBytes>
__global__ void cp_async_kernel(const uint8_t* in, uint8_t* out) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const int thread = threadIdx.x, group_bytes = blockDim.x * kBytes;
  for (int group = 0; group < 3; ++group) {
    const int offset = group * group_bytes + thread * kBytes;
    if (group == 2) {
      cp_async_zero_fill<kBytes>(smem_address(smem + offset), in + offset, thread % (kBytes + 1));
    } else {
      cp_async<kBytes>(smem_address(smem + offset), in + offset, group != 1 || thread % 2 == 0);
    }
    cp_async_commit_group();
  }
  const auto write_out = [&](int group) {
    for (int i = thread; i < group_bytes; i += blockDim.x) out[group * group_bytes + i] = smem[group * group_bytes + i];
  };
  cp_async_wait_group<2>();
  __syncthreads();
  write_out(0);
  cp_async_wait_group<1>();
  __syncthreads();
  write_out(1);
  cp_async_wait_group<0>();
  __syncthreads();
  write_out(2);
}
extern "C" const char* ptx_cp_async(const uint8_t* in, uint8_t* out, int bytes, void* stream) {
  const size_t smem_bytes = 3 * 64 * static_cast<size_t>(bytes);
  if (bytes == 4) return launch_kernel(cp_async_kernel<4>, 1, 64, smem_bytes, stream_of(stream), in, out);
  if (bytes == 8) return launch_kernel(cp_async_kernel<8>, 1, 64, smem_bytes, stream_of(stream), in, out);
  return launch_kernel(cp_async_kernel<16>, 1, 64, smem_bytes, stream_of(stream), in, out);
}

// ---- ldmatrix: in (32 rows, 8 elements), out (32 lanes, kMatrices registers)

template <int kMatrices, bool kTrans>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x;
  auto* rows = reinterpret_cast<uint16_t*>(smem);
  for (int i = lane; i < 256; i += 32) rows[i] = in[i];
  __syncthreads();
  uint32_t registers[kMatrices];
  const uint32_t row_smem = smem_address(rows + 8 * lane);
  if constexpr (kTrans) {
    ldmatrix_trans(registers, row_smem);
  } else {
    ldmatrix(registers, row_smem);
  }
  for (int i = 0; i < kMatrices; ++i) out[lane * kMatrices + i] = registers[i];
}
template <int kMatrices>
static const char* run_ldmatrix(const uint16_t* in, uint32_t* out, bool trans, void* stream) {
  if (trans) return launch_kernel(ldmatrix_kernel<kMatrices, true>, 1, 32, 512, stream_of(stream), in, out);
  return launch_kernel(ldmatrix_kernel<kMatrices, false>, 1, 32, 512, stream_of(stream), in, out);
}
extern "C" const char* ptx_ldmatrix(const uint16_t* in, uint32_t* out, int matrices, int trans, void* stream) {
  if (matrices == 1) return run_ldmatrix<1>(in, out, trans != 0, stream);
  if (matrices == 2) return run_ldmatrix<2>(in, out, trans != 0, stream);
  return run_ldmatrix<4>(in, out, trans != 0, stream);
}

// ---- mma: fragments (32 lanes, registers), as they lie in registers

template <typename Element>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t a_rmem[4], b_rmem[2];
  float d_rmem[4];
  for (int i = 0; i < 4; ++i) a_rmem[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b_rmem[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d_rmem[i] = c[lane * 4 + i];
  mma_m16n8k16<Element>(d_rmem, a_rmem, b_rmem);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = d_rmem[i];
}
extern "C" const char* ptx_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d, int is_half,
                               void* stream) {
  if (is_half != 0) return launch_kernel(mma_kernel<half_t>, 1, 32, 0, stream_of(stream), a, b, c, d);
  return launch_kernel(mma_kernel<bfloat16_t>, 1, 32, 0, stream_of(stream), a, b, c, d);
}

__global__ void mma_s8_kernel(const uint32_t* a, const uint32_t* b, const int* c, int* d) {
  const int lane = threadIdx.x;
  uint32_t a_rmem[4], b_rmem[2];
  int d_rmem[4];
  for (int i = 0; i < 4; ++i) a_rmem[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b_rmem[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d_rmem[i] = c[lane * 4 + i];
  mma_m16n8k32_s8(d_rmem, a_rmem, b_rmem);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = d_rmem[i];
}
extern "C" const char* ptx_mma_s8(const uint32_t* a, const uint32_t* b, const int* c, int* d, void* stream) {
  return launch_kernel(mma_s8_kernel, 1, 32, 0, stream_of(stream), a, b, c, d);
}

// ---- arithmetic: out (rows, n), one row a function

__global__ void math_kernel(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float x = in[i];
  out[i] = ex2_approx(x);
  out[n + i] = lg2_approx(x);
  out[2 * n + i] = rcp_approx(x);
  out[3 * n + i] = tanh_approx(x);
  out[4 * n + i] = rsqrtf(x);
  out[5 * n + i] = static_cast<float>(__float2int_rn(x));
}
extern "C" const char* ptx_math(const float* in, float* out, int n, void* stream) {
  return launch_kernel(math_kernel, (n + 127) / 128, 128, 0, stream_of(stream), in, out, n);
}

__global__ void integer_kernel(const unsigned* a, const unsigned* b, int* out) {
  const int i = threadIdx.x;
  out[i] = __dp4a(static_cast<int>(a[i]), static_cast<int>(b[i]), i);
  out[32 + i] = static_cast<int>(__byte_perm(a[i], b[i], 0x6240));
  out[64 + i] = __popc(a[i]);
  out[96 + i] = __ffs(static_cast<int>(a[i]));
}
extern "C" const char* ptx_integer(const unsigned* a, const unsigned* b, int* out, void* stream) {
  return launch_kernel(integer_kernel, 1, 32, 0, stream_of(stream), a, b, out);
}

// ---- vec.cuh: fp32 to 16 bits and back, singly and in pairs; n is a multiple of 8

template <typename Element>
__global__ void convert_kernel(const float* in, Element* single, uint32_t* pairs, float* back) {
  const int first = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  Vec<Element> vec;
  for (int i = 0; i < 8; ++i) vec[i] = from_float<Element>(in[first + i]);
  store_vec(single + first, vec);
  for (int i = 0; i < 8; i += 2) pairs[(first + i) / 2] = pack2<Element>(in[first + i], in[first + i + 1]);
  const Vec<Element> again = load_vec<8>(single + first);
  for (int i = 0; i < 8; i += 2) {
    back[first + i] = to_float(again[i]);
    back[first + i + 1] = unpack2<Element>(pairs[(first + i) / 2]).y;
  }
}
extern "C" const char* ptx_convert(const float* in, uint16_t* single, uint32_t* pairs, float* back, int n, int is_half,
                                   void* stream) {
  const int blocks = n / 256;
  if (is_half != 0) {
    return launch_kernel(convert_kernel<half_t>, blocks, 32, 0, stream_of(stream), in,
                         reinterpret_cast<half_t*>(single), pairs, back);
  }
  return launch_kernel(convert_kernel<bfloat16_t>, blocks, 32, 0, stream_of(stream), in,
                       reinterpret_cast<bfloat16_t*>(single), pairs, back);
}

// ---- reduce.cuh: out (rows, 128), one row a reduction

__global__ void reduce_kernel(const float* in, float* out) {
  FASTATTN_SHARED(scratch, float[4]);
  const int i = threadIdx.x;
  const float value = in[i];
  out[i] = warp_reduce<4>(value, Sum{});
  out[128 + i] = warp_reduce(value, Max{});
  out[256 + i] = block_reduce(value, Sum{}, scratch);
  out[384 + i] = block_reduce(value, Max{}, scratch);
}
extern "C" const char* ptx_reduce(const float* in, float* out, void* stream) {
  return launch_kernel(reduce_kernel, 1, 128, 0, stream_of(stream), in, out);
}
