#include "attention/attention_fwd_launch.cuh"

namespace fastattn {
template const char* launch_fwd_cached<half_t, 64>(ScoreKind, const AttentionFwdArgs&, dim3, cudaStream_t);
template const char* launch_fwd_cached<half_t, 128>(ScoreKind, const AttentionFwdArgs&, dim3, cudaStream_t);
template const char* launch_fwd_cached<half_t, 256>(ScoreKind, const AttentionFwdArgs&, dim3, cudaStream_t);
}  // namespace fastattn
