// int8_matmul on CUDA with bf16 output.
#include "int8_matmul/int8_matmul_launch.cuh"

namespace fastattn {
FASTATTN_INT8_MATMUL_UNIT(, bfloat16_t)
}  // namespace fastattn
