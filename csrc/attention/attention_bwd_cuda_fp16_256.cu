#include "attention/attention_bwd_launch.cuh"

namespace fastattn {
template const char* launch_bwd_dkv_tile<half_t, 192>(int, const AttentionBwdArgs&, dim3, cudaStream_t);
template const char* launch_bwd_dq_tile<half_t, 192>(int, const AttentionBwdArgs&, dim3, cudaStream_t);
template const char* launch_bwd_dkv_tile<half_t, 256>(int, const AttentionBwdArgs&, dim3, cudaStream_t);
template const char* launch_bwd_dq_tile<half_t, 256>(int, const AttentionBwdArgs&, dim3, cudaStream_t);
}  // namespace fastattn
