// Parameters of the layer norm kernels, shared by every backend (no torch headers), and the kernels' entry points.
//
//   layer_norm   out = (x - mean) * rstd * weight + bias      mean, rstd = 1 / sqrt(variance + eps) of each row
//   rms_norm     out = x * rstd * weight                      rstd = 1 / sqrt(mean of squares + eps)
//   add_*        x = new_residual = residual + dropout(input), one more output
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// A (rows, cols) operand: stride in elements, columns contiguous.
struct RowTensor {
  void* data = nullptr;
  int64_t stride_row = 0;
};

// "Statistics type" below: double if x is kFloat64, else float.
struct LayerNormParams {
  int64_t rows = 0, cols = 0;
  bool rms = false;
  double eps = 0.0;

  // What is normalised. For add_* it is new_residual, which the kernel writes before it reads it.
  DType x_dtype = DType::kFloat32;
  RowTensor x;
  DType out_dtype = DType::kFloat32;
  RowTensor out;
  // (cols,) of the statistics type; nullptr = 1, 0. A bias needs a weight.
  const void* weight = nullptr;
  const void* bias = nullptr;
  // (rows,) of the statistics type; mean is unused by rms.
  void* mean = nullptr;
  void* rstd = nullptr;

  // add_* only: input has out_dtype, residual x_dtype. residual.data == nullptr: not add_*.
  RowTensor input;
  RowTensor residual;
  // 0 = no dropout. rng_state is (seed, offset); see common/philox.h. The row is counted as
  // (batch_head, row) = (row >> 32, row & 0xffffffff).
  double dropout_p = 0.0;
  const int64_t* rng_state = nullptr;
};

// On the CPU; a device has as many as it runs at once.
constexpr int64_t kMaxBwdBlocks = 128;

struct LayerNormBwdParams {
  int64_t rows = 0, cols = 0;
  bool rms = false;

  DType x_dtype = DType::kFloat32;
  RowTensor x;
  DType out_dtype = DType::kFloat32;
  RowTensor dout;
  // (cols,) of the statistics type, never null.
  const void* weight = nullptr;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  // Gradient that reaches new_residual from elsewhere, x_dtype; nullptr = 0.
  RowTensor dnew_residual;

  // Gradient of x (for add_*: of residual), x_dtype.
  RowTensor dx;
  // add_* only: gradient of input, out_dtype, where it differs from dx in dtype or by dropout; nullptr = not wanted.
  RowTensor dinput;
  double dropout_p = 0.0;
  const int64_t* rng_state = nullptr;

  // (cols,) of the statistics type; nullptr = not wanted.
  void* dweight = nullptr;
  void* dbias = nullptr;
  // dweight and dbias are summed within blocks of rows, then over the blocks, at most kMaxBwdBlocks, both in a fixed
  // order: the result does not depend on the number of threads. partial: (blocks, 4, cols) of the statistics type,
  // where either is wanted. On a device the launcher chooses the blocks and takes their sums, (blocks, 2, cols), from
  // its workspace.
  int64_t rows_per_block = 0;
  void* partial = nullptr;
};

FASTATTN_DECLARE_CPU_KERNEL(void, layer_norm_fwd_cpu, (const LayerNormParams& p))
FASTATTN_DECLARE_CPU_KERNEL(void, layer_norm_bwd_cpu, (const LayerNormBwdParams& p))

// x and out: float16, bfloat16 or float32, the same or x float32. Columns are counted in 32 bits.
constexpr int64_t kMaxCudaCols = int64_t{1} << 30;
const char* layer_norm_fwd_cuda(const LayerNormParams& p, const DeviceLaunch& launch);
const char* layer_norm_bwd_cuda(const LayerNormBwdParams& p, const DeviceLaunch& launch);
size_t layer_norm_bwd_cuda_workspace_bytes(const LayerNormBwdParams& p, const DeviceLaunch& launch);

}  // namespace fastattn
