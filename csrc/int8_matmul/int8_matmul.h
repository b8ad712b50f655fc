// Parameters of the INT8 kernels, shared by every backend (no torch headers), and the kernels' entry points.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/device.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// The int32 sum of K products of int8 values, -128 among them, cannot overflow up to here: 128 * 128 * K < 2^31.
constexpr int64_t kInt8MaxDepth = 131071;

struct QuantizeInt8Params {
  int64_t rows = 0, depth = 0;
  // (rows, depth) of dtype; rows at any stride (elements), last dim contiguous.
  DType dtype = DType::kFloat32;
  const void* input = nullptr;
  int64_t stride_input = 0;
  int8_t* q = nullptr;  // (rows, depth)
  int64_t stride_q = 0;
  float* scale = nullptr;  // (rows,)
};

// out = activation((a @ b^T) * a_scale * b_scale + bias)
struct Int8MatmulParams {
  int64_t rows = 0, columns = 0, depth = 0;
  // a (rows, depth): int8 with its a_scale, or floating, to be quantised by row here (then a_scale is not read).
  DType a_dtype = DType::kInt8;
  const void* a = nullptr;
  int64_t stride_a = 0;
  const float* a_scale = nullptr;
  // b (columns, depth) int8, or the same made by int8_pack_weight_cpu (then b is not read).
  const int8_t* b = nullptr;
  int64_t stride_b = 0;
  const void* b_packed = nullptr;
  const float* b_scale = nullptr;
  const void* bias = nullptr;  // (columns,) or absent
  DType bias_dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  void* out = nullptr;  // (rows, columns) contiguous
  DType out_dtype = DType::kFloat32;
  void* workspace = nullptr;  // for the CPU: int8_matmul_workspace_bytes(p), 64-byte aligned
};

// The packed weight starts with this, so that its user can tell whether it still is the packed form of that weight.
struct PackedWeightHeader {
  uint64_t magic;
  int64_t columns, depth;
  uint64_t source;          // address of the weight's first element ...
  uint64_t source_version;  // ... and torch's count of its in-place changes
  uint8_t padding[24];
};
static_assert(sizeof(PackedWeightHeader) == 64, "the panels behind it are 64-byte aligned");
constexpr uint64_t kPackedWeightMagic = 0x314E4E5633544E49;

// Packed weight: header | int32 [panels][32], -128 * sum over k of b | int8 [panels][depth / 4][32][4], zero-padded.
// Four neighbours in k stand together because one VNNI lane multiplies and sums four; 32 columns are two registers.
constexpr int64_t kPanelColumns = 32;
constexpr int64_t kGroupDepth = 4;
constexpr int64_t int8_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t int8_groups(int64_t depth) { return (depth + kGroupDepth - 1) / kGroupDepth; }
constexpr int64_t int8_panel_bytes(int64_t depth) { return int8_groups(depth) * kGroupDepth * kPanelColumns; }
constexpr int64_t int8_packed_bytes(int64_t columns, int64_t depth) {
  return static_cast<int64_t>(sizeof(PackedWeightHeader)) +
         int8_panels(columns) * (kPanelColumns * static_cast<int64_t>(sizeof(int32_t)) + int8_panel_bytes(depth));
}

FASTATTN_DECLARE_CPU_KERNEL(void, quantize_int8_cpu, (const QuantizeInt8Params& p))
FASTATTN_DECLARE_CPU_KERNEL(int64_t, int8_matmul_workspace_bytes, (const Int8MatmulParams& p))
FASTATTN_DECLARE_CPU_KERNEL(void, int8_matmul_cpu, (const Int8MatmulParams& p))
// Writes what stands behind the header of `packed` (int8_packed_bytes long).
FASTATTN_DECLARE_CPU_KERNEL(void, int8_pack_weight_cpu,
                            (const int8_t* b, int64_t stride_b, int64_t columns, int64_t depth, void* packed))

// ---- CUDA. b is read as it is: b_packed is the CPU's.

const char* quantize_int8_cuda(const QuantizeInt8Params& p, const DeviceLaunch& launch);
// For the quantised input, for copies of operands whose rows do not start at multiples of 16 bytes, for partial sums.
size_t int8_matmul_cuda_workspace_bytes(const Int8MatmulParams& p, const DeviceLaunch& launch);
const char* int8_matmul_cuda(const Int8MatmulParams& p, const DeviceLaunch& launch);

}  // namespace fastattn
