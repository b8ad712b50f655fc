// Starting kernels. Launchers return null, or why the launch failed; the torch glue raises it.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

#if defined(FASTATTN_EMULATED)
#include "emulator/launch.h"
#endif

namespace fastattn {

// A kernel that does not ask for more has 48 KiB, static and dynamic shared memory together. No more than 8 KiB are
// static: the emulator sees to that, and to it that a kernel asks for the same whenever it asks. The limit is an
// attribute of the kernel: of two threads with different wishes, one could lower it between the other's two calls.
inline bool asks_for_shared_memory(size_t dynamic_smem_bytes) { return dynamic_smem_bytes > 40 * 1024; }

#if !defined(FASTATTN_EMULATED)
// Null, or what went wrong. The runtime would keep it as the thread's last error, which whoever asks next takes for
// their own: PyTorch does after each of its launches.
inline const char* take_error(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(status);
}
#endif

// launch_clusters(kernel<Traits>, grid, cluster, block, dynamic_smem_bytes, stream, arguments...) starts clusters of up
// to 8 blocks (compute capability 9.0; ptx_cluster.cuh), which divide the grid. It is the only way to a cluster:
// kernels have no __cluster_dims__. Never synchronises: on a device the result covers the launch, in the emulator also
// the run.
template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 cluster, dim3 block, size_t smem_bytes,
                            [[maybe_unused]] cudaStream_t stream, Arguments&&... arguments) {
#if defined(FASTATTN_EMULATED)
  return emu::launch(kernel, grid, cluster, block, {smem_bytes, asks_for_shared_memory(smem_bytes)}, arguments...);
#else
  if (asks_for_shared_memory(smem_bytes)) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes));
    if (const char* error = take_error(status)) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  config.attrs = &attribute;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;  // cards without clusters take no such attribute
  return take_error(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// How many clusters a device runs at once; `in_theory` is what its multiprocessors would hold were clusters not bound
// to groups of them.
template <typename... Parameters>
int max_resident_clusters([[maybe_unused]] void (*kernel)(Parameters...), [[maybe_unused]] dim3 cluster,
                          [[maybe_unused]] dim3 block, [[maybe_unused]] size_t smem_bytes, int in_theory) {
#if defined(FASTATTN_EMULATED)
  return in_theory;
#else
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config = {};
  config.gridDim = cluster;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const char* error = take_error(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return error == nullptr && clusters > 0 ? clusters : in_theory;
#endif
}

// launch_kernel(kernel<Traits>, grid, block, dynamic_smem_bytes, stream, arguments...): without clusters.
template <typename... Parameters, typename... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_clusters(kernel, grid, dim3(1), block, smem_bytes, stream, arguments...);
}

// fn(std::integral_constant<int, choice>{}) of the choice that is `value`: from a number to a template argument.
template <int... kChoices, typename Fn>
const char* launch_choice(int value, Fn&& fn) {
  const char* error = "there is no kernel for this choice";
  static_cast<void>(((value == kChoices && (error = fn(std::integral_constant<int, kChoices>{}), true)) || ...));
  return error;
}

}  // namespace fastattn
