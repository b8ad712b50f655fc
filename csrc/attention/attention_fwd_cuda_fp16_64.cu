#include "attention/attention_fwd_launch.cuh"

namespace fastattn {
template const char* launch_fwd_tile<half_t, 32>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
template const char* launch_fwd_tile<half_t, 64>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
}  // namespace fastattn
