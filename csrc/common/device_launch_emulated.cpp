// Launches in the emulator (csrc/emulator), where nvcc did not compile the CUDA kernels.
#include <algorithm>
#include <thread>

#include "common/device_launch.h"
#include "emulator/launch.h"

namespace fastattn {

static int os_threads_of(const EmulatorSettings& settings) {
  if (settings.os_threads > 0) return settings.os_threads;
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

// Shared memory that one block may have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
static size_t shared_bytes_per_block(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

static emu::Config config_of(const EmulatorSettings& settings) {
  return {static_cast<emu::Schedule>(settings.schedule),
          static_cast<emu::AsyncMode>(settings.async_mode),
          settings.seed,
          os_threads_of(settings),
          shared_bytes_per_block(settings.compute_capability),
          /*exact_turns=*/settings.checks_values,
          settings.rough_approximations};
}

static EmulatorSettings& current_settings() {
  static EmulatorSettings settings = [] {
    const EmulatorSettings defaults;
    emu::config() = config_of(defaults);
    return defaults;
  }();
  return settings;
}

void configure_emulator(const EmulatorSettings& settings) {
  current_settings() = settings;
  emu::config() = config_of(settings);
}

DeviceLaunch make_launch(const at::Tensor& tensor) {
  const EmulatorSettings& settings = current_settings();
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.device().is_cpu() || settings.takes_gpu_tensors,
                              "fastattn was built without CUDA kernels, got a tensor on ", tensor.device(),
                              ". fastattn.available_backends()['cuda'] says why.");
  DeviceLaunch launch;
  launch.compute_capability = settings.compute_capability;
  launch.multiprocessors = settings.multiprocessors;
  launch.shared_bytes_per_block = shared_bytes_per_block(settings.compute_capability);
  launch.deterministic = at::globalContext().deterministicAlgorithms();
  return launch;
}

bool emulator_checks_values() { return current_settings().checks_values; }
uint64_t emulated_launches() { return emu::launches(); }
bool has_cuda_kernels() { return false; }
const char* cuda_architectures() { return ""; }

}  // namespace fastattn
