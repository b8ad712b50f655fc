// What the torch glue of every op checks alike.
#pragma once

#include <ATen/ATen.h>

#include "common/dtype.h"

namespace fastattn {

// CUDA's limit in x, in which direction the grids of these kernels grow with their tensors.
constexpr int64_t kMaxGridBlocks = INT32_MAX;

// The kernels' name of a floating dtype; TypeError for any other.
inline DType kernel_dtype(const char* op, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, op, ": dtype ", type, " is not float32, bfloat16, float16 or float64.");
  }
}

}  // namespace fastattn
