// What the CUDA kernels do to the int32 sums:  out = cast(activation((sum * a_scale) * b_scale + bias)).
// Numbers: fp32 until the cast, which rounds to nearest even. The order of operations, and the form of gelu, are those
//          of int8_epilogue_cpu.h. NaN stays NaN through every activation.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {

// What a matrix kernel reads. Rows of a and b start at multiples of 16 bytes.
struct Int8KernelParams {
  int64_t rows = 0, columns = 0;
  int depth = 0;
  const int8_t* a = nullptr;
  int64_t stride_a = 0;
  const float* a_scale = nullptr;
  const int8_t* b = nullptr;
  int64_t stride_b = 0;
  const float* b_scale = nullptr;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  void* out = nullptr;
  int64_t stride_out = 0;
  // Split k: part s of `splits` sums k in [s, s + 1) * depth_per_split, and its int32 sums go to out + s * rows *
  // stride_out. Otherwise splits is 1.
  int splits = 1;
  int depth_per_split = 0;
};

// x / (1 + exp(-y)). From 2^126 on, where the reciprocal would be denormal and rcp flushes it, the result is x * 0.
FASTATTN_DEVICE float times_sigmoid(float x, float y) { return x * rcp_approx(1.0f + ex2_approx(y * -1.44269504f)); }

// x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), without the cancellation of 1 + erf for negative x.
// Phi(-z) = exp(-z^2 / 2) * P(1 / (1 + 0.3 z)); int8_epilogue_cpu.h says where P comes from. From z = 15 on it is 0.
FASTATTN_DEVICE float gelu(float x) {
  const float z = fminf(fabsf(x), 15.0f);
  const float t = rcp_approx(fmaf(z, 0.3f, 1.0f));
  float p = 0.0383783169f;
  p = fmaf(p, t, -0.169166237f);
  p = fmaf(p, t, 0.228660315f);
  p = fmaf(p, t, -0.0765067339f);
  p = fmaf(p, t, 0.142535686f);
  p = fmaf(p, t, 0.0946834609f);
  p = fmaf(p, t, 0.121920355f);
  p = fmaf(p, t, 0.119487688f);
  p = fmaf(p, t, 7.16896739e-6f);
  const float positive = x < 0.0f ? 0.0f : x;  // not fmaxf, which drops NaN
  return fmaf(-z, p * ex2_approx(z * z * -0.72134752f), positive);
}

FASTATTN_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      // 1 + tanh(u) = 2 * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
      return times_sigmoid(x, x * fmaf(x * x, 0.071354816f, 1.5957691f));
    case Activation::kSilu:
      return times_sigmoid(x, x);
    default:
      return x;
  }
}

// Scale and bias of neighbouring columns; 0 for those past the last.
template <int kCount>
struct ColumnConstants {
  float scale[kCount], bias[kCount];

  FASTATTN_DEVICE ColumnConstants(const Int8KernelParams& p, int64_t column) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool exists = column + i < p.columns;
      scale[i] = exists ? p.b_scale[column + i] : 0.0f;
      bias[i] = exists && p.bias != nullptr ? load_bias(p, column + i) : 0.0f;
    }
  }

  FASTATTN_DEVICE static float load_bias(const Int8KernelParams& p, int64_t column) {
    if (p.bias_dtype == DType::kBFloat16) return to_float(static_cast<const bfloat16_t*>(p.bias)[column]);
    if (p.bias_dtype == DType::kFloat16) return to_float(static_cast<const half_t*>(p.bias)[column]);
    return static_cast<const float*>(p.bias)[column];
  }
};

// Finishes the sums of kCount neighbouring columns of a row and stores those that exist. Out = int32_t stores the sums.
template <typename Out, int kCount>
FASTATTN_DEVICE void finish_columns(const Int8KernelParams& p, const int (&sum)[kCount], float row_scale,
                                    const ColumnConstants<kCount>& constants, Out* out, int64_t columns_left) {
  Vec<Out, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Out, int32_t>) {
      result[i] = sum[i];
    } else {
      const float scaled = static_cast<float>(sum[i]) * row_scale;
      result[i] = from_float<Out>(activate(p.activation, fmaf(scaled, constants.scale[i], constants.bias[i])));
    }
  }
  if (columns_left >= kCount && p.stride_out % kCount == 0) {
    store_vec(out, result);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < columns_left) out[i] = result[i];
    }
  }
}

// Reads a warp's staged sums, kRows x kColumns at a pitch of kPitch, finishes and stores them: 4 neighbouring columns a
// lane, so that a warp writes whole lines. (row, column): where the first belongs in out.
template <typename Out, int kRows, int kColumns, int kPitch>
FASTATTN_DEVICE void store_staged_sums(const Int8KernelParams& p, const int32_t* staging, int64_t row, int64_t column) {
  constexpr int kLanesPerRow = kColumns / 4, kRowsPerPass = 32 / kLanesPerRow;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_row = lane / kLanesPerRow, lane_column = lane % kLanesPerRow * 4;
  const ColumnConstants<4> constants(p, column + lane_column);
  // Parts of a split have rows of whole vectors, so that the sum over them can load them so.
  constexpr bool kIsPart = std::is_same_v<Out, int32_t>;
  const int64_t columns_left = (kIsPart ? p.stride_out : p.columns) - column - lane_column;
  Out* out = static_cast<Out*>(p.out) + blockIdx.y * p.rows * p.stride_out + column + lane_column;
#pragma unroll 1
  for (int r = lane_row; r < kRows; r += kRowsPerPass) {
    if (row + r >= p.rows || columns_left <= 0) break;
    const int4 staged = *reinterpret_cast<const int4*>(staging + r * kPitch + lane_column);
    const int sums[4] = {staged.x, staged.y, staged.z, staged.w};
    const float row_scale = kIsPart ? 1.0f : p.a_scale[row + r];
    finish_columns(p, sums, row_scale, constants, out + (row + r) * p.stride_out, columns_left);
  }
}

}  // namespace fastattn
