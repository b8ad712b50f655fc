// Layer norm and attention forward in small, whole kernels of compute capability 8.0, each right as it stands and with
// one synchronisation left out at a time (Bug). test_emulator_bugs.py shows that the emulator catches every one.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

using namespace fastattn;

enum class Bug : int { kNone, kNoWait, kNoBarrierForK, kNoBarrierForV, kNoBoundsCheck, kNoBarrierInSum, kBufferReused };

// ---- layer norm without weights: one block a row of n floats

constexpr int kNormThreads = 256;

template <Bug kBug>
__device__ inline float block_sum(float value, float (&partial)[kNormThreads / 32]) {
  value = warp_reduce(value, Sum{});
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if constexpr (kBug != Bug::kNoBarrierInSum) __syncthreads();
  float total = 0.0f;
  for (float part : partial) total += part;
  if constexpr (kBug != Bug::kBufferReused)
    __syncthreads();  // before the next sum overwrites what a slow warp still reads
  return total;
}

template <Bug kBug>
__global__ void __launch_bounds__(kNormThreads) layer_norm_kernel(const float* x, float* out, int n, float eps) {
  FASTATTN_SHARED(partial, float[kNormThreads / 32]);
  const float* row = x + static_cast<int64_t>(blockIdx.x) * n;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += kNormThreads) sum += row[i];
  const float mean = block_sum<kBug>(sum, partial) / n;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += kNormThreads) squares += (row[i] - mean) * (row[i] - mean);
  const float rstd = rsqrtf(block_sum<kBug>(squares, partial) / n + eps);
  for (int i = threadIdx.x; i < n; i += kNormThreads) {
    out[static_cast<int64_t>(blockIdx.x) * n + i] = (row[i] - mean) * rstd;
  }
}

extern "C" const char* bugs_layer_norm(const float* x, float* out, int rows, int n, int bug, void* stream) {
  const auto kernel = bug == static_cast<int>(Bug::kNoBarrierInSum) ? layer_norm_kernel<Bug::kNoBarrierInSum>
                      : bug == static_cast<int>(Bug::kBufferReused) ? layer_norm_kernel<Bug::kBufferReused>
                                                                    : layer_norm_kernel<Bug::kNone>;
  return launch_kernel(kernel, rows, kNormThreads, 0, static_cast<cudaStream_t>(stream), x, out, n, 1e-5f);
}

// ---- attention forward: q, k, v (batch * heads, seqlen, 64) bf16. Four warps, each 16 query rows; keys and values
// double buffered by cp.async; rows of 128 bytes whose 16-byte chunks are XORed with the row against bank conflicts.

constexpr int kBlock = 64, kHeadDim = 64, kThreads = 128, kTileBytes = kBlock * kHeadDim * 2;

__device__ inline uint32_t chunk_smem(uint32_t tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

template <Bug kBug>
__device__ inline void load_tile(uint32_t tile, const bfloat16_t* source, int first_row, int seqlen) {
  for (int i = threadIdx.x; i < kBlock * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const bool valid = kBug == Bug::kNoBoundsCheck || first_row + row < seqlen;
    const int64_t source_row = valid ? first_row + row : 0;
    cp_async<16>(chunk_smem(tile, row, chunk), source + source_row * kHeadDim + chunk * 8, valid);
  }
  cp_async_commit_group();
}

// s (16 x 64) = q k^T for this warp's rows
__device__ inline void scores(float (&s)[8][4], const uint32_t (&q)[4][4], uint32_t k_tile, int lane) {
  for (int step = 0; step < 4; ++step) {
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t keys[4];
      ldmatrix(keys, chunk_smem(k_tile, pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      mma_m16n8k16<bfloat16_t>(s[2 * pair], q[step], {keys[0], keys[1]});
      mma_m16n8k16<bfloat16_t>(s[2 * pair + 1], q[step], {keys[2], keys[3]});
    }
  }
}

// out += p v
__device__ inline void accumulate(float (&out)[8][4], const float (&p)[8][4], uint32_t v_tile, int lane) {
  for (int step = 0; step < 4; ++step) {
    const float (&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
    const uint32_t weights[4] = {pack2<bfloat16_t>(left[0], left[1]), pack2<bfloat16_t>(left[2], left[3]),
                                 pack2<bfloat16_t>(right[0], right[1]), pack2<bfloat16_t>(right[2], right[3])};
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t values[4];
      ldmatrix_trans(values, chunk_smem(v_tile, step * 16 + lane % 16, pair * 2 + lane / 16));
      mma_m16n8k16<bfloat16_t>(out[2 * pair], weights, {values[0], values[1]});
      mma_m16n8k16<bfloat16_t>(out[2 * pair + 1], weights, {values[2], values[3]});
    }
  }
}

// Turns scores into exponentials relative to the running maximum and rescales what was summed under the old one.
__device__ inline void online_softmax(float (&s)[8][4], float (&out)[8][4], float (&row_max)[2], float (&row_sum)[2],
                                      float scale_log2) {
  for (int half = 0; half < 2; ++half) {
    float new_max = row_max[half];
    for (auto& tile : s) new_max = fmaxf(new_max, fmaxf(tile[2 * half], tile[2 * half + 1]));
    new_max = warp_reduce<4>(new_max, Max{});
    const float rescale = ex2_approx((row_max[half] - new_max) * scale_log2);
    row_max[half] = new_max;
    row_sum[half] *= rescale;
    for (int n = 0; n < 8; ++n) {
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        out[n][i] *= rescale;
        s[n][i] = ex2_approx((s[n][i] - new_max) * scale_log2);
        row_sum[half] += s[n][i];
      }
    }
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const bfloat16_t* q, const bfloat16_t* k, const bfloat16_t* v, bfloat16_t* out, int seqlen,
                     float scale_log2) {
  FASTATTN_DYNAMIC_SMEM(smem);
  const uint32_t q_tile = smem_address(smem), k_tiles = q_tile + kTileBytes, v_tiles = k_tiles + 2 * kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = blockIdx.x * kBlock;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * seqlen * kHeadDim;
  const int blocks = (seqlen + kBlock - 1) / kBlock;

  load_tile<Bug::kNone>(q_tile, q + head, first_row, seqlen);
  load_tile<kBug>(k_tiles, k + head, 0, seqlen);
  load_tile<kBug>(v_tiles, v + head, 0, seqlen);
  float o[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  uint32_t q_rmem[4][4];
  for (int block = 0; block < blocks; ++block) {
    const uint32_t buffer = block % 2 * kTileBytes, other = kTileBytes - buffer;
    if constexpr (kBug != Bug::kNoWait) cp_async_wait_group<1>();  // k has landed, v may be on its way
    if constexpr (kBug != Bug::kNoBarrierForK) __syncthreads();
    if (block == 0) {
      for (int step = 0; step < 4; ++step) {
        ldmatrix(q_rmem[step], chunk_smem(q_tile, warp * 16 + lane % 16, step * 2 + lane / 16));
      }
    }
    if (block + 1 < blocks) {
      load_tile<kBug>(k_tiles + other, k + head, (block + 1) * kBlock, seqlen);
    } else {
      cp_async_commit_group();
    }
    float s[8][4] = {};
    scores(s, q_rmem, k_tiles + buffer, lane);
    for (int n = 0; n < 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        if (block * kBlock + n * 8 + lane % 4 * 2 + i % 2 >= seqlen) s[n][i] = -INFINITY;
      }
    }
    online_softmax(s, o, row_max, row_sum, scale_log2);
    cp_async_wait_group<1>();  // v has landed
    if constexpr (kBug != Bug::kNoBarrierForV) __syncthreads();
    if (block + 1 < blocks) {
      load_tile<kBug>(v_tiles + other, v + head, (block + 1) * kBlock, seqlen);
    } else {
      cp_async_commit_group();
    }
    accumulate(o, s, v_tiles + buffer, lane);
  }
  cp_async_wait_group<0>();
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.0f / warp_reduce<4>(row_sum[half], Sum{});
    const int row = first_row + warp * 16 + lane / 4 + half * 8;
    if (row >= seqlen) continue;
    for (int n = 0; n < 8; ++n) {
      const uint32_t pair = pack2<bfloat16_t>(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
      *reinterpret_cast<uint32_t*>(out + head + static_cast<int64_t>(row) * kHeadDim + n * 8 + lane % 4 * 2) = pair;
    }
  }
}

template <Bug kBug>
static const char* run_attention(const void* q, const void* k, const void* v, void* out, int batch_heads, int seqlen,
                                 void* stream) {
  const dim3 grid((seqlen + kBlock - 1) / kBlock, batch_heads);
  const float scale_log2 = 0.125f * 1.4426950408889634f;
  return launch_kernel(attention_kernel<kBug>, grid, kThreads, 5 * kTileBytes, static_cast<cudaStream_t>(stream),
                       static_cast<const bfloat16_t*>(q), static_cast<const bfloat16_t*>(k),
                       static_cast<const bfloat16_t*>(v), static_cast<bfloat16_t*>(out), seqlen, scale_log2);
}

extern "C" const char* bugs_attention(const void* q, const void* k, const void* v, void* out, int batch_heads,
                                      int seqlen, int bug, void* stream) {
  switch (static_cast<Bug>(bug)) {
    case Bug::kNoWait:
      return run_attention<Bug::kNoWait>(q, k, v, out, batch_heads, seqlen, stream);
    case Bug::kNoBarrierForK:
      return run_attention<Bug::kNoBarrierForK>(q, k, v, out, batch_heads, seqlen, stream);
    case Bug::kNoBarrierForV:
      return run_attention<Bug::kNoBarrierForV>(q, k, v, out, batch_heads, seqlen, stream);
    case Bug::kNoBoundsCheck:
      return run_attention<Bug::kNoBoundsCheck>(q, k, v, out, batch_heads, seqlen, stream);
    default:
      return run_attention<Bug::kNone>(q, k, v, out, batch_heads, seqlen, stream);
  }
}
