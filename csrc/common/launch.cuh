// Starting kernels. Launchers return null, or why the launch failed; the torch glue raises it.
#pragma once

#include "common/cuda.cuh"

#if defined(FASTATTN_EMULATED)
#include "emulator/launch.h"
#endif

namespace fastattn {

// launch_kernel(kernel<Traits>, grid, block, dynamic_smem_bytes, stream, arguments...). Never synchronises: on a device
// the result covers the launch, in the emulator also the run.
template <typename... Parameters, typename... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          Arguments&&... arguments) {
#if defined(FASTATTN_EMULATED)
  return emu::launch(kernel, grid, block, smem_bytes, stream, arguments...);
#else
  constexpr size_t kSmemWithoutOptIn = 48 * 1024;
  if (smem_bytes > kSmemWithoutOptIn) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#endif
}

}  // namespace fastattn
