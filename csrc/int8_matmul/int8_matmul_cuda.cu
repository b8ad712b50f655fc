// int8_matmul and int8_linear on CUDA: quantises a and aligns rows where that is needed, then multiplies.
#include "int8_matmul/int8_align_rows.cuh"
#include "int8_matmul/int8_matmul_launch.cuh"

namespace fastattn {

FASTATTN_INT8_MATMUL_UNIT(extern, float)
FASTATTN_INT8_MATMUL_UNIT(extern, half_t)
FASTATTN_INT8_MATMUL_UNIT(extern, bfloat16_t)
extern template const char* launch_int8_hopper<float>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);
extern template const char* launch_int8_hopper<half_t>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);
extern template const char* launch_int8_hopper<bfloat16_t>(Int8Tile, const Int8KernelParams&, int, cudaStream_t);

namespace {

// Whether a kernel can read the rows in place. TMA takes no rows that overlap, such as expanded ones.
bool rows_are_aligned(const int8_t* first, int64_t stride, int64_t rows, int64_t depth, const Int8Plan& plan) {
  if (reinterpret_cast<uintptr_t>(first) % 16 != 0) return false;
  return rows <= 1 || (stride % 16 == 0 && (stride >= depth || !is_hopper_tile(plan.tile)));
}

// What stands in the workspace, by offset: a quantised or aligned, its scales, b aligned, the parts of a split.
struct Workspace {
  bool fuses = false, quantizes = false, aligns_a = false, aligns_b = false;
  Int8Plan plan;
  int64_t stride = 0;          // of the copies of a and b
  int64_t stride_partial = 0;  // columns in whole vectors
  int64_t a = 0, a_scale = 0, b = 0, partial = 0, bytes = 0;

  Workspace(const Int8MatmulParams& p, const Int8Plan& plan_) : plan(plan_) {
    fuses = fuses_int8_quantization(p, plan);
    quantizes = !fuses && p.a_dtype != DType::kInt8;
    aligns_a = p.a_dtype == DType::kInt8 &&
               !rows_are_aligned(static_cast<const int8_t*>(p.a), p.stride_a, p.rows, p.depth, plan);
    aligns_b = !rows_are_aligned(p.b, p.stride_b, p.columns, p.depth, plan);
    stride = int8_aligned_stride(p.depth);
    stride_partial = int8_ceil_div(p.columns, 4) * 4;
    a = reserve(quantizes || aligns_a ? p.rows * stride : 0);
    a_scale = reserve(quantizes ? p.rows * 4 : 0);
    b = reserve(aligns_b ? p.columns * stride : 0);
    partial = reserve(plan.splits > 1 ? plan.splits * p.rows * stride_partial * 4 : 0);
  }

 private:
  int64_t reserve(int64_t wanted) {
    const int64_t offset = bytes;
    bytes += int8_ceil_div(wanted, 256) * 256;
    return offset;
  }
};

// From p's floating a to kernel's int8 a.
QuantizeInt8Params quantization_of(const Int8MatmulParams& p, const Int8KernelParams& kernel) {
  QuantizeInt8Params q;
  q.rows = p.rows;
  q.depth = p.depth;
  q.dtype = p.a_dtype;
  q.input = p.a;
  q.stride_input = p.stride_a;
  q.q = const_cast<int8_t*>(kernel.a);
  q.stride_q = kernel.stride_a;
  q.scale = const_cast<float*>(kernel.a_scale);
  return q;
}

template <typename Out>
const char* multiply(const Int8KernelParams& p, const QuantizeInt8Params& input, const Workspace& layout,
                     const DeviceLaunch& launch) {
  char* const workspace = static_cast<char*>(launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (layout.fuses) return launch_int8_linear<Out>(layout.plan.tile, p, input, stream);
  if (is_hopper_tile(layout.plan.tile)) {
    return launch_int8_hopper<Out>(layout.plan.tile, p, launch.multiprocessors, stream);
  }
  if (layout.plan.splits == 1) return launch_int8_matmul<Out>(layout.plan.tile, p, stream);
  Int8KernelParams part = p;
  part.out = workspace + layout.partial;
  part.stride_out = layout.stride_partial;
  if (const char* error = launch_int8_partial(layout.plan.tile, part, stream)) return error;
  return launch_int8_finish<Out>(p, reinterpret_cast<const int32_t*>(workspace + layout.partial), layout.stride_partial,
                                 stream);
}

}  // namespace

size_t int8_matmul_cuda_workspace_bytes(const Int8MatmulParams& p, const Int8Plan& plan) {
  return p.rows == 0 || p.columns == 0 ? 0 : static_cast<size_t>(Workspace(p, plan).bytes);
}

const char* int8_matmul_cuda(const Int8MatmulParams& p, const Int8Plan& plan, const DeviceLaunch& launch) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  const Workspace layout(p, plan);
  char* const workspace = static_cast<char*>(launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);

  Int8KernelParams kernel;
  kernel.rows = p.rows;
  kernel.columns = p.columns;
  kernel.depth = static_cast<int>(p.depth);
  kernel.b = p.b;
  kernel.stride_b = p.stride_b;
  kernel.b_scale = p.b_scale;
  kernel.bias = p.bias;
  kernel.bias_dtype = p.bias_dtype;
  kernel.activation = p.activation;
  kernel.out = p.out;
  kernel.stride_out = p.columns;
  kernel.splits = plan.splits;
  kernel.depth_per_split = plan.depth_per_split;
  kernel.a = static_cast<const int8_t*>(p.a);
  kernel.stride_a = p.stride_a;
  kernel.a_scale = p.a_scale;
  if (layout.quantizes || layout.aligns_a) {
    kernel.a = reinterpret_cast<const int8_t*>(workspace + layout.a);
    kernel.stride_a = layout.stride;
  }
  if (layout.quantizes) kernel.a_scale = reinterpret_cast<const float*>(workspace + layout.a_scale);
  const QuantizeInt8Params input = quantization_of(p, kernel);
  const char* error = nullptr;
  if (layout.quantizes) {
    error = quantize_int8_cuda(input, launch);
  } else if (layout.aligns_a) {
    error = align_int8_rows(static_cast<const int8_t*>(p.a), p.stride_a, p.rows, p.depth,
                            reinterpret_cast<int8_t*>(workspace + layout.a), stream);
  }
  if (error != nullptr) return error;
  if (layout.aligns_b) {
    int8_t* const copy = reinterpret_cast<int8_t*>(workspace + layout.b);
    error = align_int8_rows(p.b, p.stride_b, p.columns, p.depth, copy, stream);
    if (error != nullptr) return error;
    kernel.b = copy;
    kernel.stride_b = layout.stride;
  }

  switch (p.out_dtype) {
    case DType::kFloat32:
      return multiply<float>(kernel, input, layout, launch);
    case DType::kFloat16:
      return multiply<half_t>(kernel, input, layout, launch);
    case DType::kBFloat16:
      return multiply<bfloat16_t>(kernel, input, layout, launch);
    default:
      return "int8_matmul: the output must be float32, bfloat16 or float16";
  }
}

size_t int8_matmul_cuda_workspace_bytes(const Int8MatmulParams& p, const DeviceLaunch& launch) {
  return int8_matmul_cuda_workspace_bytes(p, plan_int8_matmul(p.rows, p.columns, p.depth, launch));
}

const char* int8_matmul_cuda(const Int8MatmulParams& p, const DeviceLaunch& launch) {
  return int8_matmul_cuda(p, plan_int8_matmul(p.rows, p.columns, p.depth, launch), launch);
}

}  // namespace fastattn
