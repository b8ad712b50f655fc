// Describing tensors to the TMA of compute capability 9.0, on the host.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

#if !defined(FASTATTN_EMULATED)
#include <cudaTypedefs.h>
#endif

namespace fastattn {

#if defined(FASTATTN_EMULATED)
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// How 16-byte chunks are permuted in shared memory, so that eight rows of a tile fall into different banks. The value
// is the pattern's width in bytes; a tile starts at a multiple of eight times that.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

namespace detail {

#if defined(FASTATTN_EMULATED)

template <typename Element>
constexpr emu::Element tensor_map_element() {
  if constexpr (std::is_same_v<Element, half_t>) return emu::Element::kFloat16;
  if constexpr (std::is_same_v<Element, bfloat16_t>) return emu::Element::kBFloat16;
  if constexpr (std::is_same_v<Element, float>) return emu::Element::kFloat32;
  if constexpr (std::is_same_v<Element, int8_t>) return emu::Element::kInt8;
  if constexpr (std::is_same_v<Element, int32_t>) return emu::Element::kInt32;
}

inline const char* encode_tensor_map(TensorMap& map, emu::Element element, int element_bytes, void* base, int rank,
                                     const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                                     Swizzle swizzle) {
  return emu::encode_tensor_map(map, static_cast<int>(element), element_bytes, base, rank, dim, stride_bytes, box,
                                static_cast<int>(swizzle));
}

#else

template <typename Element>
constexpr CUtensorMapDataType tensor_map_element() {
  if constexpr (std::is_same_v<Element, half_t>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if constexpr (std::is_same_v<Element, bfloat16_t>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if constexpr (std::is_same_v<Element, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if constexpr (std::is_same_v<Element, int8_t>) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if constexpr (std::is_same_v<Element, int32_t>) return CU_TENSOR_MAP_DATA_TYPE_INT32;
}

// The driver's encoder, looked up at run time: so the library needs no libcuda to link or to load.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
}

inline CUtensorMapSwizzle driver_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

// Makes the device's context current in this thread: a call of the runtime does so, the driver's own functions do not.
inline bool make_context_current() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}

inline const char* encode_tensor_map(TensorMap& map, CUtensorMapDataType element, int, void* base, int rank,
                                     const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                                     Swizzle swizzle) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = tensor_map_encoder();
  if (encoder == nullptr) return "tensor map: the driver has no cuTensorMapEncodeTiled (CUDA 12 is needed)";
  const uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const auto encode = [&] {
    return encoder(&map, element, static_cast<uint32_t>(rank), base, dim, stride_bytes, box, element_strides,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, driver_swizzle(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  // A thread's first call may be this one: in autograd's threads and those of users.
  if (result == CUDA_ERROR_INVALID_CONTEXT && make_context_current()) result = encode();
  if (result == CUDA_SUCCESS) return nullptr;
  return result == CUDA_ERROR_INVALID_VALUE ? "tensor map: the driver refused the tensor's alignment, strides or box"
                                            : "tensor map: the driver cannot be used in this thread";
}

#endif

}  // namespace detail

// A strided tensor of kRank (1 to 5) dimensions, innermost first, with strides in elements; stride[0] must be 1. A copy
// moves a box of `box` elements: what lies outside the tensor is read as zero and not written. Null, or the error.
template <typename Element, int kRank>
const char* make_tensor_map(TensorMap& map, const Element* base, const uint64_t (&dim)[kRank],
                            const uint64_t (&stride)[kRank], const uint32_t (&box)[kRank], Swizzle swizzle) {
  static_assert(kRank >= 1 && kRank <= 5, "make_tensor_map: 1 to 5 dimensions");
  if (stride[0] != 1) return "tensor map: the innermost dimension must be contiguous";
  uint64_t stride_bytes[kRank] = {};
  for (int i = 1; i < kRank; ++i) stride_bytes[i - 1] = stride[i] * sizeof(Element);
  return detail::encode_tensor_map(map, detail::tensor_map_element<Element>(), sizeof(Element),
                                   const_cast<Element*>(base), kRank, dim, stride_bytes, box, swizzle);
}

}  // namespace fastattn
