#include "attention/attention_bwd_sm90_launch.cuh"

namespace fastattn {
FASTATTN_BWD_SM90_UNIT(, half_t, 192)
}  // namespace fastattn
