// Which of the forward's CUDA kernels a call takes, for those who want to tell it.
#pragma once

#include "attention/attention.h"

namespace fastattn {

// Null if attention_fwd_cuda would start Hopper's own kernel, else why it would start those of compute capability 8.0.
const char* attention_fwd_sm90_refusal(const AttentionParams& p, const DeviceLaunch& launch);

}  // namespace fastattn
