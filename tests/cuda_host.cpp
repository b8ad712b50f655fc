// The host's side of a launch (common/launch.cuh, common/tensor_map.cuh) against a CUDA runtime and driver that note
// what they are asked. Compiled by the C++ compiler with CUDA's headers and linked with none of its libraries.
#include <string_view>
#include <utility>

static void __trap() {}  // which only code for the device knows

#include "common/launch.cuh"
#include "common/tensor_map.cuh"

using namespace fastattn;

// ---- what was asked

struct Encoded {
  int32_t calls, element, rank, interleave, swizzle, promotion, fill;
  uint32_t box[5], element_strides[5];
  uint64_t base, dim[5], stride_bytes[4];
};
struct Launched {
  int32_t grid, block, clusters, cluster[3], shared_bytes, granted_shared_bytes, argument;
};

namespace {

Encoded encoded;
Launched launched;
cudaError_t launch_result = cudaSuccess;
thread_local bool context_is_current = false;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Refuses what the driver API's manual says cuTensorMapEncodeTiled refuses.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType element, cuuint32_t rank, void* base, const cuuint64_t* dim,
                      const cuuint64_t* stride_bytes, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  ++encoded.calls;
  if (!context_is_current) return CUDA_ERROR_INVALID_CONTEXT;
  const auto address = reinterpret_cast<uint64_t>(base);
  bool valid = reinterpret_cast<uint64_t>(map) % 64 == 0 && rank >= 1 && rank <= 5 && address % 16 == 0;
  for (cuuint32_t i = 0; valid && i < rank; ++i) {
    valid = dim[i] >= 1 && dim[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && element_strides[i] >= 1 &&
            element_strides[i] <= 8;
    valid = valid && (i + 1 == rank || (stride_bytes[i] % 16 == 0 && stride_bytes[i] < uint64_t{1} << 40));
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  encoded = {encoded.calls, element, static_cast<int32_t>(rank), interleave, swizzle, promotion, fill};
  encoded.base = address;
  for (cuuint32_t i = 0; i < rank; ++i) {
    encoded.dim[i] = dim[i], encoded.box[i] = box[i], encoded.element_strides[i] = element_strides[i];
    if (i + 1 < rank) encoded.stride_bytes[i] = stride_bytes[i];
  }
  return CUDA_SUCCESS;
}

}  // namespace

// ---- the runtime

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  context_is_current = true;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "the runtime refused"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string_view(symbol) == "cuTensorMapEncodeTiled" && version == 12000;
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) launched.granted_shared_bytes = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  const cudaLaunchAttribute* attribute = config->numAttrs == 0 ? nullptr : config->attrs;
  launched.grid = static_cast<int32_t>(config->gridDim.x);
  launched.block = static_cast<int32_t>(config->blockDim.x);
  launched.shared_bytes = static_cast<int32_t>(config->dynamicSmemBytes);
  launched.clusters = attribute != nullptr && attribute->id == cudaLaunchAttributeClusterDimension;
  if (launched.clusters != 0) {
    const auto& cluster = attribute->val.clusterDim;
    launched.cluster[0] = static_cast<int32_t>(cluster.x), launched.cluster[1] = static_cast<int32_t>(cluster.y);
    launched.cluster[2] = static_cast<int32_t>(cluster.z);
  }
  launched.argument = *static_cast<int*>(arguments[0]);
  return remember(launch_result);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 5;
  return remember(launch_result);
}

// ---- calls. A thread starts without a context, as with CUDA.

namespace {

struct MapCall {
  uint64_t base, dim[4], stride[4];
  uint32_t box[4];
  int32_t swizzle;
};

template <typename Element, int kRank>
const char* encode_rank(const MapCall& call) {
  uint64_t dim[kRank], stride[kRank];
  uint32_t box[kRank];
  for (int i = 0; i < kRank; ++i) dim[i] = call.dim[i], stride[i] = call.stride[i], box[i] = call.box[i];
  TensorMap map;
  return make_tensor_map(map, reinterpret_cast<const Element*>(call.base), dim, stride, box,
                         static_cast<Swizzle>(call.swizzle));
}

void kernel(int) {}

}  // namespace

extern "C" const char* encode_map(const MapCall* call, int element, int rank, bool with_context, Encoded* seen) {
  context_is_current = with_context;
  encoded = {};
  const auto of_element = [&](auto one) {
    return rank == 2 ? encode_rank<decltype(one), 2>(*call) : encode_rank<decltype(one), 4>(*call);
  };
  const char* error = element == 0   ? of_element(bfloat16_t{})
                      : element == 1 ? of_element(half_t{})
                      : element == 2 ? of_element(float{})
                                     : of_element(int8_t{});
  *seen = encoded;
  return error;
}

extern "C" const char* launch(int grid, int cluster, int block, int shared_bytes, int argument, bool fails,
                              Launched* seen) {
  launched = {};
  launch_result = fails ? cudaErrorInvalidConfiguration : cudaSuccess;
  const char* error =
      launch_clusters(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(cluster)),
                      dim3(static_cast<unsigned>(block)), static_cast<size_t>(shared_bytes), nullptr, argument);
  *seen = launched;
  return error;
}
extern "C" int resident_clusters(bool fails) {
  launch_result = fails ? cudaErrorInvalidConfiguration : cudaSuccess;
  return max_resident_clusters(kernel, dim3(2), dim3(32), 0, 7);
}
extern "C" int error_left_behind() { return cudaGetLastError(); }
