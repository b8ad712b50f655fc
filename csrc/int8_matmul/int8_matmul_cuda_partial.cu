// int8_matmul on CUDA: the int32 sums of a split product.
#include "int8_matmul/int8_matmul_launch.cuh"

namespace fastattn {

const char* launch_int8_partial(Int8Tile tile, const Int8KernelParams& p, cudaStream_t stream) {
  if (tile == Int8Tile::k64x64) return launch_int8_tile<Int8Tile64x64, int32_t>(p, stream);
  if (tile == Int8Tile::k64x128) return launch_int8_tile<Int8Tile64x128, int32_t>(p, stream);
  return "int8_matmul: this tile is not split";
}

}  // namespace fastattn
