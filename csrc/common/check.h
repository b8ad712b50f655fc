// What the torch glue of every op checks alike.
#pragma once

#include <ATen/ATen.h>

#include "common/activation.h"
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

inline Activation parse_activation(const char* op, c10::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(false, op, ": activation must be 'none', 'relu', 'gelu', 'gelu_tanh' or 'silu', got '", name, "'.");
}

}  // namespace fastattn
