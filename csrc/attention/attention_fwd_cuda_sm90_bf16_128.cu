#include "attention/attention_fwd_sm90_launch.cuh"

namespace fastattn {
template const char* launch_fwd_sm90_tile<bfloat16_t, 128>(int, const AttentionFwdArgs&, int, cudaStream_t);
}  // namespace fastattn
