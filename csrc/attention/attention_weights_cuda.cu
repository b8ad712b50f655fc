// Launches the attention weights.
#include "attention/attention_weights_sm80.cuh"
#include "common/device.h"
#include "common/launch.cuh"

namespace fastattn {
namespace {

template <typename Element, int kHeadDim>
const char* launch_weights(AttentionWeightsArgs& args, const AttentionWeightsParams& p, cudaStream_t stream) {
  using Traits = AttentionWeightsTraits<Element, kHeadDim>;
  args.row_tiles = (p.seqlen_q + Traits::kBlockQ - 1) / Traits::kBlockQ;
  args.key_tiles = (p.seqlen_k + Traits::kBlockK - 1) / Traits::kBlockK;
  const int64_t blocks = p.batch * (p.average_heads ? 1 : p.heads) * args.row_tiles * args.key_tiles;
  if (blocks > INT32_MAX) return "there are too many weights";
  return launch_kernel(attention_weights_kernel<Traits>, static_cast<unsigned>(blocks), Traits::kThreads,
                       Traits::kSmemBytes, stream, args);
}

template <typename Element>
const char* launch_weights(AttentionWeightsArgs& args, const AttentionWeightsParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_weights<Element, 64>(args, p, stream);
  if (p.head_dim <= 128) return launch_weights<Element, 128>(args, p, stream);
  if (p.head_dim <= 256) return launch_weights<Element, 256>(args, p, stream);
  return "head_dim is above 256";
}

}  // namespace

const char* attention_weights_cuda(const AttentionWeightsParams& p, const DeviceLaunch& launch) {
  AttentionWeightsArgs args;
  if (const char* error = make_score_args(args.scores, p)) return error;
  args.q = p.q, args.k = p.k;
  args.lse = static_cast<const float*>(p.lse);
  args.weights = p.weights;
  args.heads_kv = static_cast<int>(p.heads_kv), args.head_dim = static_cast<int>(p.head_dim);
  args.average_heads = p.average_heads;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return p.dtype == DType::kFloat16 ? launch_weights<half_t>(args, p, stream)
                                    : launch_weights<bfloat16_t>(args, p, stream);
}

}  // namespace fastattn
