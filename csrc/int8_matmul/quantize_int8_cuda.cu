// Launches quantize_int8.cuh: enough threads per row that it fits their registers, one warp where that is enough.
#include "int8_matmul/quantize_int8.cuh"

namespace fastattn {
namespace {

template <typename Traits>
const char* launch(const QuantizeInt8Params& p, const DeviceLaunch& device) {
  const int64_t blocks = (p.rows + Traits::kRowsPerBlock - 1) / Traits::kRowsPerBlock;
  if (blocks > INT32_MAX) return "quantize_int8: more than 2^31 rows";
  return launch_kernel(quantize_int8_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0,
                       static_cast<cudaStream_t>(device.stream), p);
}

template <typename Element>
const char* launch_for_depth(const QuantizeInt8Params& p, const DeviceLaunch& device) {
  const int64_t bytes = p.depth * static_cast<int64_t>(sizeof(Element));
  if (bytes <= 32 * 4 * 16) return launch<QuantizeInt8Traits<Element, 1, 4>>(p, device);
  if (bytes <= 128 * 4 * 16) return launch<QuantizeInt8Traits<Element, 4, 4>>(p, device);
  return launch<QuantizeInt8Traits<Element, 8, 8>>(p, device);
}

}  // namespace

const char* quantize_int8_cuda(const QuantizeInt8Params& p, const DeviceLaunch& launch) {
  if (p.rows == 0) return nullptr;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_for_depth<float>(p, launch);
    case DType::kBFloat16:
      return launch_for_depth<bfloat16_t>(p, launch);
    case DType::kFloat16:
      return launch_for_depth<half_t>(p, launch);
    default:
      return "quantize_int8: the input must be float32, bfloat16 or float16";
  }
}

}  // namespace fastattn
