// Launches of the matrix kernels for one type of output; int8_matmul_cuda_*.cu hold one instantiation each.
#pragma once

#include "int8_matmul/int8_matmul_few_rows_sm80.cuh"
#include "int8_matmul/int8_matmul_plan.h"
#include "int8_matmul/int8_matmul_sm80.cuh"

namespace fastattn {

using Int8Tile64x64 = Int8TileShape<64, 64, 128, 32, 32, 3>;
using Int8Tile64x128 = Int8TileShape<64, 128, 64, 32, 64, 4>;
using Int8Tile128x128 = Int8TileShape<128, 128, 64, 64, 64, 3>;
using Int8Tile128x256 = Int8TileShape<128, 256, 64, 64, 64, 4>;

template <typename Tile, typename Out>
const char* launch_int8_tile(const Int8KernelParams& p, cudaStream_t stream) {
  // 8.6, 8.9 and 12.0 have the least.
  static_assert(Tile::kSmemBytes <= 99 * 1024, "runs on every card from compute capability 8.0 on");
  const int64_t tiles = int8_ceil_div(p.rows, Tile::kRows) * int8_ceil_div(p.columns, Tile::kColumns);
  if (tiles > INT32_MAX) return "int8_matmul: the output has more than 2^31 tiles";
  return launch_kernel(int8_matmul_kernel<Tile, Out>,
                       dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits)), dim3(Tile::kThreads),
                       Tile::kSmemBytes, stream, p);
}

template <typename Shape, typename Out>
const char* launch_int8_few_rows(const Int8KernelParams& p, cudaStream_t stream) {
  const int64_t blocks = int8_ceil_div(p.columns, Shape::kColumns);
  if (blocks > INT32_MAX) return "int8_matmul: b has more than 2^34 rows";
  return launch_kernel(int8_matmul_few_rows_kernel<Shape, Out>, dim3(static_cast<unsigned>(blocks)),
                       dim3(Shape::kThreads), Shape::kSmemBytes, stream, p);
}

template <typename Shape, typename Element>
const char* launch_int8_linear_few_rows(const Int8KernelParams& p, const QuantizeInt8Params& input,
                                        cudaStream_t stream) {
  const int64_t blocks = int8_ceil_div(p.columns, Shape::kColumns);
  if (blocks > INT32_MAX) return "int8_linear: the weight has more than 2^34 rows";
  const size_t q_bytes = static_cast<size_t>(p.rows) * static_cast<size_t>(int8_fused_stride(p.depth));
  const size_t wanted = Shape::kSmemBytes + q_bytes;
  return launch_kernel(
      int8_linear_few_rows_kernel<Shape, Element>, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
      asks_for_shared_memory(wanted) ? Shape::kSmemBytes + kInt8MaxFusedBytes : wanted, stream, p, input);
}

// Quantisation and product in one launch, where fuses_int8_quantization.
template <typename Element>
const char* launch_int8_linear(Int8Tile tile, const Int8KernelParams& p, const QuantizeInt8Params& input,
                               cudaStream_t stream) {
  if (tile == Int8Tile::kFewRows8) return launch_int8_linear_few_rows<Int8FewRowsShape<1>, Element>(p, input, stream);
  if (tile == Int8Tile::kFewRows16) return launch_int8_linear_few_rows<Int8FewRowsShape<2>, Element>(p, input, stream);
  return launch_int8_linear_few_rows<Int8FewRowsShape<4>, Element>(p, input, stream);
}

// The product, in one launch. p.splits is 1.
template <typename Out>
const char* launch_int8_matmul(Int8Tile tile, const Int8KernelParams& p, cudaStream_t stream) {
  switch (tile) {
    case Int8Tile::kFewRows8:
      return launch_int8_few_rows<Int8FewRowsShape<1>, Out>(p, stream);
    case Int8Tile::kFewRows16:
      return launch_int8_few_rows<Int8FewRowsShape<2>, Out>(p, stream);
    case Int8Tile::kFewRows32:
      return launch_int8_few_rows<Int8FewRowsShape<4>, Out>(p, stream);
    case Int8Tile::k64x64:
      return launch_int8_tile<Int8Tile64x64, Out>(p, stream);
    case Int8Tile::k64x128:
      return launch_int8_tile<Int8Tile64x128, Out>(p, stream);
    case Int8Tile::k128x128:
      return launch_int8_tile<Int8Tile128x128, Out>(p, stream);
    case Int8Tile::k128x256:
      return launch_int8_tile<Int8Tile128x256, Out>(p, stream);
    default:
      break;
  }
  return "int8_matmul: unknown tile";
}

// The second launch of a split product: sums `partial` (splits, rows, stride_partial) and finishes.
template <typename Out>
const char* launch_int8_finish(const Int8KernelParams& p, const int32_t* partial, int64_t stride_partial,
                               cudaStream_t stream) {
  const int64_t blocks = int8_ceil_div(p.rows * (stride_partial / 4), 256);
  return launch_kernel(int8_matmul_finish_kernel<Out>, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, p,
                       partial, stride_partial);
}

// Declared for the unit that plans, instantiated by the units that compile the kernels.
#define FASTATTN_INT8_MATMUL_UNIT(declaration, Out)                                                          \
  declaration template const char* launch_int8_matmul<Out>(Int8Tile, const Int8KernelParams&, cudaStream_t); \
  declaration template const char* launch_int8_finish<Out>(const Int8KernelParams&, const int32_t*, int64_t, \
                                                           cudaStream_t);                                    \
  declaration template const char* launch_int8_linear<Out>(Int8Tile, const Int8KernelParams&,                \
                                                           const QuantizeInt8Params&, cudaStream_t);

// The same by the tiles of int8_matmul_sm90.cuh and persistent blocks, one a multiprocessor: int8_matmul_cuda_sm90.cu.
template <typename Out>
const char* launch_int8_hopper(Int8Tile tile, const Int8KernelParams& p, int multiprocessors, cudaStream_t stream);

// The parts of a split product: small tiles alone are split.
const char* launch_int8_partial(Int8Tile tile, const Int8KernelParams& p, cudaStream_t stream);

}  // namespace fastattn
