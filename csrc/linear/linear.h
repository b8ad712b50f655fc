// Parameters of the linear layer's kernel (no torch headers), and its entry point.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// Up to how many rows of `dtype` the kernel is faster here than PyTorch's product; 0 = never. csrc/linear/README.md has
// the measurements.
int64_t linear_max_rows(DType dtype);

// out = activation(input @ weight^T + bias)
struct LinearParams {
  int64_t rows = 0, columns = 0, depth = 0;
  DType dtype = DType::kFloat32;  // of every tensor: kFloat32, kBFloat16 or kFloat16
  const void* input = nullptr;    // (rows, depth), rows at any stride (elements), their elements contiguous
  int64_t stride_input = 0;
  const void* weight = nullptr;  // (columns, depth), likewise
  int64_t stride_weight = 0;
  const void* bias = nullptr;  // (columns,) or absent
  Activation activation = Activation::kNone;
  void* out = nullptr;  // (rows, columns) contiguous
};

FASTATTN_DECLARE_CPU_KERNEL(void, linear_cpu, (const LinearParams& p))

}  // namespace fastattn
