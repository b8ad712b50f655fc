#include "attention/attention_fwd_launch.cuh"

namespace fastattn {
template const char* launch_fwd_tile<bfloat16_t, 96>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
template const char* launch_fwd_tile<bfloat16_t, 128>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
}  // namespace fastattn
