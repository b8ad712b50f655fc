// Copies int8 rows so that each starts at a multiple of 16 bytes, as the matrix kernels need (K is odd, or a slice).
// Work:    a thread writes 16 bytes.
// Memory:  bytes are read one by one, through L1; beside the product this costs about one more pass over the operand.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"

namespace fastattn {

constexpr int64_t int8_aligned_stride(int64_t depth) { return (depth + 15) / 16 * 16; }

static __global__ void __launch_bounds__(256)
    int8_align_rows_kernel(const int8_t* source, int64_t stride, int64_t rows, int64_t depth, int8_t* aligned) {
  const int64_t pieces = int8_aligned_stride(depth) / 16, index = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int64_t row = index / pieces, first = index % pieces * 16;
  if (row >= rows) return;
  const int8_t* bytes = source + row * stride + first;
  Vec<int8_t, 16> piece;
#pragma unroll
  for (int i = 0; i < 16; ++i) piece[i] = first + i < depth ? bytes[i] : int8_t{0};
  store_vec(aligned + index * 16, piece);
}

inline const char* align_int8_rows(const int8_t* source, int64_t stride, int64_t rows, int64_t depth, int8_t* aligned,
                                   cudaStream_t stream) {
  const int64_t blocks = (rows * (int8_aligned_stride(depth) / 16) + 255) / 256;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "int8_matmul: an operand has more than 2^43 bytes";
  return launch_kernel(int8_align_rows_kernel, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, source,
                       stride, rows, depth, aligned);
}

}  // namespace fastattn
