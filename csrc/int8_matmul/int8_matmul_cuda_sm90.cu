// int8_matmul on Hopper: makes the tensor maps and launches int8_matmul_sm90.cuh.
#include "int8_matmul/int8_matmul_launch.cuh"
#include "int8_matmul/int8_matmul_sm90.cuh"

namespace fastattn {
namespace {

// What fits 227 KiB beside the staging area: 4 stages of 48 KiB, 6 of 32.
using Cooperative128x256 = Int8Sm90Shape<128, 256, Int8Schedule::kCooperative, 4>;
using Halves128x256 = Int8Sm90Shape<128, 256, Int8Schedule::kHalves, 4>;
using PingPong128x128 = Int8Sm90Shape<128, 128, Int8Schedule::kPingPong, 6>;

// Of the 128x256 tiles' schedules. Writing a tile out takes about as long as three stages of products. kHalves hides
// that, but reads a twice from shared memory, a fifth more in all, which is then about as busy as the tensor cores: it
// is for tiles of up to so many stages. Fewer than the fewest do not have stages for both ends of a tile.
constexpr int kFewestHalvesStages = 2 * Halves128x256::kHalfStages, kMostHalvesStages = 32;

// Rows of k, of which a copy takes `box_rows` times 128 bytes. A single row may have any stride.
const char* make_rows_map(TensorMap& map, const int8_t* rows, int64_t count, int64_t stride, int depth, int box_rows) {
  const uint64_t row_stride = count > 1 ? static_cast<uint64_t>(stride) : static_cast<uint64_t>((depth + 15) / 16 * 16);
  const uint64_t dim[2] = {static_cast<uint64_t>(depth), static_cast<uint64_t>(count)}, strides[2] = {1, row_stride};
  const uint32_t box[2] = {128, static_cast<uint32_t>(box_rows)};
  return make_tensor_map(map, rows, dim, strides, box, Swizzle::k128);
}

template <typename Shape, typename Out>
const char* launch(const Int8KernelParams& p, int multiprocessors, cudaStream_t stream) {
  constexpr size_t kSmemBytes = sizeof(Int8Sm90Smem<Shape>);
  static_assert(kSmemBytes <= 227 * 1024, "what a block of compute capability 9.0 can have");
  const int64_t tiles = int8_ceil_div(p.rows, Shape::kRows) * int8_ceil_div(p.columns, Shape::kColumns);
  if (tiles > INT32_MAX - 2 * multiprocessors) return "int8_matmul: the output has more than 2^31 tiles";
  TensorMap a_map, b_map;
  if (const char* error = make_rows_map(a_map, p.a, p.rows, p.stride_a, p.depth, Shape::kRows)) return error;
  if (const char* error = make_rows_map(b_map, p.b, p.columns, p.stride_b, p.depth, Shape::kColumns)) return error;
  const unsigned blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  return launch_kernel(int8_matmul_sm90_kernel<Shape, Out>, dim3(blocks), dim3(Shape::kThreads), kSmemBytes, stream, p,
                       a_map, b_map, static_cast<int>(tiles));
}

}  // namespace

template <typename Out>
const char* launch_int8_hopper(Int8Tile tile, const Int8KernelParams& p, int multiprocessors, cudaStream_t stream) {
  if (tile == Int8Tile::kHopper128x128) return launch<PingPong128x128, Out>(p, multiprocessors, stream);
  const int stages = (p.depth + Halves128x256::kDepth - 1) / Halves128x256::kDepth;
  return stages >= kFewestHalvesStages && stages <= kMostHalvesStages
             ? launch<Halves128x256, Out>(p, multiprocessors, stream)
             : launch<Cooperative128x256, Out>(p, multiprocessors, stream);
}

template const char* launch_int8_hopper<float>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);
template const char* launch_int8_hopper<half_t>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);
template const char* launch_int8_hopper<bfloat16_t>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);

}  // namespace fastattn
