// The only file of the extension that includes CUDA's and c10's CUDA headers; a part of nvcc builds alone.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "common/device_launch.h"

namespace fastattn {

static int device_attribute(cudaDeviceAttr attribute, c10::DeviceIndex device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

DeviceLaunch make_launch(const at::Tensor& tensor) {
  const c10::DeviceIndex device = tensor.device().index();
  DeviceLaunch launch;
  launch.stream = c10::cuda::getCurrentCUDAStream(device).stream();
  launch.compute_capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                              device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  launch.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  launch.shared_bytes_per_block =
      static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  launch.deterministic = at::globalContext().deterministicAlgorithms();
  return launch;
}

bool has_cuda_kernels() { return true; }
const char* cuda_architectures() { return FASTATTN_CUDA_ARCHITECTURES; }

void configure_emulator(const EmulatorSettings&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "this build of fastattn runs its CUDA kernels on a device; it has no emulator.");
}
bool emulator_checks_values() { return true; }
uint64_t emulated_launches() { return 0; }
bool recording_graph() { return false; }  // torch.cuda.graph captures the stream itself
void record_step(std::function<void()>) {}

}  // namespace fastattn
