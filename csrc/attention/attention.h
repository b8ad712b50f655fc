// Parameters of the attention kernels, shared by every backend (no torch headers), and the CPU kernels' entry points.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// A (batch, heads, seqlen, head_dim) operand: strides in elements, last dim contiguous.
struct AttentionTensor {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0;
};

// Broadcastable to (batch, heads, seqlen_q, seqlen_k): a stride is 0 where the mask broadcasts. data == nullptr: no
// mask. kBool masks hold 1 = attend, 0 = not; kFloat32 (kFloat64 for fp64 inputs), kBFloat16, kFloat16 masks are added.
struct AttentionMask {
  const void* data = nullptr;
  DType dtype = DType::kBool;
  int64_t stride_batch = 0, stride_head = 0, stride_q = 0, stride_k = 0;
};

// Sequences packed one behind the other: sequence b is rows [cu_seqlens[b], cu_seqlens[b + 1]) of `total`. Nobody has
// to have looked at the numbers: packed.h clips them. cu_seqlens == nullptr: a dense batch.
struct PackedRows {
  const int32_t* cu_seqlens = nullptr;
  int64_t total = 0;
};

// A key/value cache that grows in place. Sequence b has lengths[b * stride_length] tokens, or `length` where that is
// null, and then `appended` new ones. Its token t is row t % block_size of the cache's entry
// table[b * stride_table + t / block_size * stride_block], or of entry b where that is null. Of int64 numbers the low
// halves are read. Nobody has to have looked at the numbers: kv_cache.h clips them. block_size == 0: there is no cache.
struct KvCache {
  const int32_t* lengths = nullptr;
  const int32_t* table = nullptr;
  int64_t stride_length = 0, stride_table = 0, stride_block = 0;
  int length = 0, appended = 0;
  int capacity = 0;  // tokens of a sequence at most, no fewer than `appended`
  int block_size = 0, entries = 0;
};

constexpr int64_t kUnlimited = int64_t{1} << 40;

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, heads_kv = 0, seqlen_q = 0, seqlen_k = 0;
  int64_t head_dim = 0, head_dim_v = 0;

  AttentionTensor q, k, v, out;
  // (batch, heads, seqlen_q) contiguous; double if dtype is kFloat64, else float. Natural log, before dropout.
  void* lse = nullptr;
  // Both are set, or none. Then a batch entry is one of the sequences, with lengths and a diagonal of its own: seqlen_q
  // and seqlen_k say how long they are at most, stride_batch of the operands is 0, lse is (heads, packed_q.total), and
  // there is no mask. packed.h has what kernels need.
  PackedRows packed_q, packed_k;
  bool packed_bottom_right = false;
  // Then a batch entry has keys of its own number, at most seqlen_k; k and v are the cache, whose entries take the
  // place of batch entries, and the last query stands at the last key.
  KvCache cache;

  double scale = 1.0;
  // Scores become softcap * tanh(scale * q.k / softcap); 0 = off.
  double softcap = 0.0;
  // Query row i stands at key i + diagonal, and sees keys [i + diagonal - window_left, i + diagonal + window_right].
  // Causal attention is window_right = 0; kUnlimited = no limit.
  int64_t diagonal = 0;
  int64_t window_left = kUnlimited, window_right = kUnlimited;
  // Adds -slope * |i + diagonal - j|. Slope of (b, h) at alibi_slopes[b * stride_alibi_batch + h].
  const float* alibi_slopes = nullptr;
  int64_t stride_alibi_batch = 0;
  // (heads,): one more logit a row, without a value. float (double for fp64 inputs).
  const void* sinks = nullptr;
  AttentionMask mask;

  double dropout_p = 0.0;
  // (seed, offset), read by the kernel; see common/philox.h.
  const int64_t* rng_state = nullptr;
};

struct AttentionBwdParams : AttentionParams {
  AttentionTensor dout;
  // Layout of lse; nullptr = 0.
  const void* dlse = nullptr;
  // dk, dv have heads_kv heads: the sum over each group of query heads.
  AttentionTensor dq, dk, dv;
  // Gradient of a floating mask, in the mask's own broadcast shape (a stride is 0 where it broadcast), accumulated in
  // float (double for fp64 inputs). nullptr = not wanted.
  void* dmask = nullptr;
  int64_t stride_dmask_batch = 0, stride_dmask_head = 0, stride_dmask_q = 0, stride_dmask_k = 0;
  // (heads,) float (double for fp64 inputs). nullptr = not wanted.
  void* dsinks = nullptr;
};

struct AttentionWeightsParams : AttentionParams {
  // Probabilities after dropout, (batch, heads, seqlen_q, seqlen_k) or, with average_heads, (batch, seqlen_q,
  // seqlen_k), contiguous, of the inputs' dtype.
  void* weights = nullptr;
  bool average_heads = false;
};

// One of the operands of a step of decoding: its rows (batch, tokens, heads, head_dim), and where they go.
struct AppendedRows {
  AttentionTensor from, to;  // stride_row leads from token to token
  int64_t tokens = 0, heads = 0, head_dim = 0;
  bool is_rotated = false;
  bool to_cache = false;  // `to` is the cache: behind the tokens that it has; else (batch, tokens, ...) like `from`
};

// Writes new keys and values to a cache, and rotates them and the queries. Elements (i, i + rotary_dim / 2) of a row,
// or (2 i, 2 i + 1) if interleaved, turn by the angle whose cosine is cos[position * stride_cos + i]; the row's
// position is the number of tokens before it, and no more than positions - 1.
struct KvAppendParams {
  static constexpr int kMaxOperands = 3;
  DType dtype = DType::kFloat16;
  int64_t batch = 0;
  KvCache cache;
  AppendedRows operands[kMaxOperands];
  int operand_count = 0;
  const void* cos = nullptr;
  const void* sin = nullptr;
  DType angle_dtype = DType::kFloat32;  // or `dtype`
  int64_t stride_cos = 0, stride_sin = 0;
  int64_t positions = 0, rotary_dim = 0;
  bool is_interleaved = false;
};

// CUDA, fp16 and bf16; they return null, or why the launch failed. Rows of q, k, v (and dout) are 16-byte aligned and
// are zero up to the next multiple of eight elements, but for a cache's, which may be any. alibi_slopes, sinks and lse
// are fp32. Positions are 32-bit numbers, sums of a few of them included.
constexpr int64_t kMaxCudaSeqlen = int64_t{1} << 28;
struct DeviceLaunch;
size_t attention_fwd_cuda_workspace_bytes(const AttentionParams& p, const DeviceLaunch& launch);
const char* attention_fwd_cuda(const AttentionParams& p, const DeviceLaunch& launch);
size_t attention_bwd_cuda_workspace_bytes(const AttentionBwdParams& p, const DeviceLaunch& launch);
const char* attention_bwd_cuda(const AttentionBwdParams& p, const DeviceLaunch& launch);
const char* attention_weights_cuda(const AttentionWeightsParams& p, const DeviceLaunch& launch);
const char* kv_append_cuda(const KvAppendParams& p, const DeviceLaunch& launch);

FASTATTN_DECLARE_BF16_CPU_KERNEL(void, attention_fwd_cpu, (const AttentionParams& p))
FASTATTN_DECLARE_BF16_CPU_KERNEL(void, attention_bwd_cpu, (const AttentionBwdParams& p))
FASTATTN_DECLARE_CPU_KERNEL(void, attention_weights_cpu, (const AttentionWeightsParams& p))
FASTATTN_DECLARE_CPU_KERNEL(void, kv_append_cpu, (const KvAppendParams& p))

}  // namespace fastattn
