// int8_matmul on CUDA with fp32 output.
#include "int8_matmul/int8_matmul_launch.cuh"

namespace fastattn {
FASTATTN_INT8_MATMUL_UNIT(, float)
}  // namespace fastattn
