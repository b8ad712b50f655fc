// The C face of the attention kernels for tests: contiguous tensors, options by number. Instrumented code takes long to
// compile: of the kernels' instances it gets those of fp16 and one head_dim or two (tests/test_kernels_sanitized.py).
#include "attention/attention.h"
#include "attention/attention_bwd_launch.cuh"
#include "attention/attention_bwd_sm90_launch.cuh"
#include "attention/attention_fwd_launch.cuh"
#include "attention/attention_fwd_sm90_launch.cuh"
#include "common/device.h"

using namespace fastattn;

// ---- what the launchers refer to and this library leaves out

namespace fastattn {

static constexpr const char* kLeftOut = "not in this library";
#define LEFT_OUT_FWD(Element, head_dim)                                                              \
  template <>                                                                                        \
  const char* launch_fwd_tile<Element, head_dim>(int, const AttentionFwdArgs&, dim3, cudaStream_t) { \
    return kLeftOut;                                                                                 \
  }
#define LEFT_OUT_FWD_CACHED(Element, head_dim)                                                               \
  template <>                                                                                                \
  const char* launch_fwd_cached<Element, head_dim>(ScoreKind, const AttentionFwdArgs&, dim3, cudaStream_t) { \
    return kLeftOut;                                                                                         \
  }
#define LEFT_OUT_BWD(Element, head_dim)                                                                  \
  template <>                                                                                            \
  const char* launch_bwd_dkv_tile<Element, head_dim>(int, const AttentionBwdArgs&, dim3, cudaStream_t) { \
    return kLeftOut;                                                                                     \
  }                                                                                                      \
  template <>                                                                                            \
  const char* launch_bwd_dq_tile<Element, head_dim>(int, const AttentionBwdArgs&, dim3, cudaStream_t) {  \
    return kLeftOut;                                                                                     \
  }
#define LEFT_OUT_FWD_SM90(Element, head_dim)                                                             \
  template <>                                                                                            \
  const char* launch_fwd_sm90_tile<Element, head_dim>(int, const AttentionFwdArgs&, int, cudaStream_t) { \
    return kLeftOut;                                                                                     \
  }
#define LEFT_OUT_BWD_SM90(Element, head_dim)                                                                         \
  template <>                                                                                                        \
  const char* launch_bwd_sm90<Element, head_dim>(const BwdSm90Tile&, const AttentionBwdSm90Args&, int64_t, unsigned, \
                                                 cudaStream_t) {                                                     \
    return kLeftOut;                                                                                                 \
  }
LEFT_OUT_FWD(half_t, 192)
LEFT_OUT_FWD(half_t, 256)
LEFT_OUT_FWD(bfloat16_t, 32)
LEFT_OUT_FWD(bfloat16_t, 64)
LEFT_OUT_FWD(bfloat16_t, 96)
LEFT_OUT_FWD(bfloat16_t, 128)
LEFT_OUT_FWD(bfloat16_t, 192)
LEFT_OUT_FWD(bfloat16_t, 256)
LEFT_OUT_FWD_CACHED(half_t, 64)
LEFT_OUT_FWD_CACHED(half_t, 128)
LEFT_OUT_FWD_CACHED(half_t, 256)
LEFT_OUT_FWD_CACHED(bfloat16_t, 64)
LEFT_OUT_FWD_CACHED(bfloat16_t, 128)
LEFT_OUT_FWD_CACHED(bfloat16_t, 256)
LEFT_OUT_BWD(half_t, 192)
LEFT_OUT_BWD(half_t, 256)
LEFT_OUT_BWD(bfloat16_t, 64)
LEFT_OUT_BWD(bfloat16_t, 96)
LEFT_OUT_BWD(bfloat16_t, 128)
LEFT_OUT_BWD(bfloat16_t, 192)
LEFT_OUT_BWD(bfloat16_t, 256)
LEFT_OUT_FWD_SM90(half_t, 64)
LEFT_OUT_FWD_SM90(half_t, 128)
LEFT_OUT_FWD_SM90(half_t, 192)
LEFT_OUT_FWD_SM90(half_t, 256)
LEFT_OUT_FWD_SM90(bfloat16_t, 64)
LEFT_OUT_FWD_SM90(bfloat16_t, 96)
LEFT_OUT_FWD_SM90(bfloat16_t, 128)
LEFT_OUT_FWD_SM90(bfloat16_t, 192)
LEFT_OUT_FWD_SM90(bfloat16_t, 256)
LEFT_OUT_BWD_SM90(half_t, 64)
LEFT_OUT_BWD_SM90(half_t, 128)
LEFT_OUT_BWD_SM90(half_t, 192)
LEFT_OUT_BWD_SM90(half_t, 256)
LEFT_OUT_BWD_SM90(bfloat16_t, 64)
LEFT_OUT_BWD_SM90(bfloat16_t, 96)
LEFT_OUT_BWD_SM90(bfloat16_t, 128)
LEFT_OUT_BWD_SM90(bfloat16_t, 192)
LEFT_OUT_BWD_SM90(bfloat16_t, 256)

}  // namespace fastattn

// ---- the face

struct AttentionCall {
  int dtype, batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, causal;
  int compute_capability, multiprocessors, deterministic;
  int total_q, total_k, bottom_right;  // of packed sequences
  float scale, softcap, dropout_p;
};

// fp16, but mask and dmask (seqlen_q, seqlen_k) or null, sinks and dsinks (heads,) or null, and lse, which are float.
struct AttentionTensors {
  void *q, *k, *v, *out, *weights, *dout, *dq, *dk, *dv;
  float *mask, *sinks, *lse, *dmask, *dsinks;
  int64_t* rng_state;
  // (batch + 1,) or null. Where they are there, batch and seqlen_q of the others are one dimension of total_q rows.
  int *cu_seqlens_q, *cu_seqlens_k;
  void* workspace;
  int64_t workspace_bytes;  // with less than a call needs, it says so and runs nothing
};

static bool is_packed(const AttentionTensors& t) { return t.cu_seqlens_q != nullptr; }

static AttentionTensor rows(void* data, int heads, int seqlen, int head_dim) {
  return {data, int64_t{heads} * seqlen * head_dim, int64_t{seqlen} * head_dim, head_dim};
}
static AttentionTensor query_rows(const AttentionCall& c, const AttentionTensors& t, void* data) {
  AttentionTensor tensor = rows(data, c.heads, is_packed(t) ? c.total_q : c.seqlen_q, c.head_dim);
  if (is_packed(t)) tensor.stride_batch = 0;
  return tensor;
}
static AttentionTensor key_rows(const AttentionCall& c, const AttentionTensors& t, void* data) {
  AttentionTensor tensor = rows(data, c.heads_kv, is_packed(t) ? c.total_k : c.seqlen_k, c.head_dim);
  if (is_packed(t)) tensor.stride_batch = 0;
  return tensor;
}

template <typename Params>
static Params params_of(const AttentionCall& c, const AttentionTensors& t) {
  Params p;
  p.dtype = static_cast<DType>(c.dtype);
  p.batch = c.batch, p.heads = c.heads, p.heads_kv = c.heads_kv;
  p.seqlen_q = c.seqlen_q, p.seqlen_k = c.seqlen_k, p.head_dim = p.head_dim_v = c.head_dim;
  p.q = query_rows(c, t, t.q), p.out = query_rows(c, t, t.out);
  p.k = key_rows(c, t, t.k), p.v = key_rows(c, t, t.v);
  if (is_packed(t)) {
    p.packed_q = {t.cu_seqlens_q, c.total_q}, p.packed_k = {t.cu_seqlens_k, c.total_k};
    p.packed_bottom_right = c.bottom_right != 0;
  }
  p.lse = t.lse;
  p.scale = c.scale, p.softcap = c.softcap, p.dropout_p = c.dropout_p;
  if (c.causal) p.window_right = 0;
  if (t.mask != nullptr) {
    p.mask = {t.mask, DType::kFloat32, 0, 0, c.seqlen_k, 1};
  }
  p.sinks = t.sinks;
  p.rng_state = t.rng_state;
  return p;
}

static DeviceLaunch launch_of(const AttentionCall& c, const AttentionTensors& t, void* stream) {
  DeviceLaunch launch;
  launch.stream = stream;
  launch.compute_capability = c.compute_capability;
  launch.multiprocessors = c.multiprocessors;
  launch.deterministic = c.deterministic != 0;
  launch.workspace = t.workspace;
  return launch;
}

extern "C" const char* attention_forward(const AttentionCall* c, const AttentionTensors* t, void* stream) {
  const auto p = params_of<AttentionParams>(*c, *t);
  const DeviceLaunch launch = launch_of(*c, *t, stream);
  if (attention_fwd_cuda_workspace_bytes(p, launch) > static_cast<size_t>(t->workspace_bytes)) return "workspace";
  return attention_fwd_cuda(p, launch);
}

static AttentionBwdParams backward_params_of(const AttentionCall& c, const AttentionTensors& t) {
  auto p = params_of<AttentionBwdParams>(c, t);
  p.dout = query_rows(c, t, t.dout), p.dq = query_rows(c, t, t.dq);
  p.dk = key_rows(c, t, t.dk), p.dv = key_rows(c, t, t.dv);
  if (t.dmask != nullptr) {
    p.dmask = t.dmask;
    p.stride_dmask_q = c.seqlen_k, p.stride_dmask_k = 1;
  }
  p.dsinks = t.dsinks;
  return p;
}

extern "C" const char* attention_backward(const AttentionCall* c, const AttentionTensors* t, void* stream) {
  const AttentionBwdParams p = backward_params_of(*c, *t);
  const DeviceLaunch launch = launch_of(*c, *t, stream);
  if (attention_bwd_cuda_workspace_bytes(p, launch) > static_cast<size_t>(t->workspace_bytes)) return "workspace";
  return attention_bwd_cuda(p, launch);
}

// What each of them needs, for a workspace behind which nothing is left.
extern "C" const char* attention_workspaces(const AttentionCall* c, const AttentionTensors* t, int64_t* bytes,
                                            void* stream) {
  const DeviceLaunch launch = launch_of(*c, *t, stream);
  bytes[0] = static_cast<int64_t>(attention_fwd_cuda_workspace_bytes(params_of<AttentionParams>(*c, *t), launch));
  bytes[1] = static_cast<int64_t>(attention_bwd_cuda_workspace_bytes(backward_params_of(*c, *t), launch));
  return nullptr;
}

extern "C" const char* attention_weights_of(const AttentionCall* c, const AttentionTensors* t, int average_heads,
                                            void* stream) {
  auto p = params_of<AttentionWeightsParams>(*c, *t);
  p.weights = t->weights, p.average_heads = average_heads != 0;
  return attention_weights_cuda(p, launch_of(*c, *t, stream));
}
