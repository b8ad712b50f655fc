// How the torch glue reaches the CUDA launchers: device_launch_cuda.cpp where nvcc compiled them, else
// device_launch_emulated.cpp, for which the C++ compiler compiled the same sources. The rest of the glue knows neither
// CUDA nor the emulator.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <functional>

#include "common/device.h"

namespace fastattn {

// --- The emulator's switch -------------------------------------------------------------------------------------------

// While it is on, ops of this thread on CPU tensors run the CUDA kernels in the emulator.
bool emulating();

// Sets the switch for a scope. Autograd functions keep what emulating() was in forward and open a scope in backward,
// which may run on another thread.
class EmulationScope {
 public:
  explicit EmulationScope(bool on);
  ~EmulationScope();
  EmulationScope(const EmulationScope&) = delete;
  EmulationScope& operator=(const EmulationScope&) = delete;

 private:
  bool before_;
};

// Whether an op on this tensor calls a CUDA launcher (run_on_device below) instead of a CPU kernel.
inline bool runs_cuda_kernels(const at::Tensor& tensor) { return tensor.is_cuda() || emulating(); }

// --- The build -------------------------------------------------------------------------------------------------------

struct EmulatorSettings {
  int schedule = 0, async_mode = 0;  // emulator/config.h
  uint64_t seed = 0;
  int os_threads = 0;  // 0 = one a core
  // The device that launchers are told of.
  int compute_capability = 80;
  int multiprocessors = 108;
  // Whether ops look at the values of lengths and tables, as on the CPU, or leave them to the kernels, as on a device.
  bool checks_values = true;
  // Whether launchers take tensors of a GPU, whose memory is then the processor's (tests/pretended_gpu).
  bool takes_gpu_tensors = false;
  bool rough_approximations = false;  // emulator/config.h
};

bool has_cuda_kernels();  // else the emulator
// Of the nvcc build, as in "80 90a 80+PTX"; empty in an emulated one.
const char* cuda_architectures();
void configure_emulator(const EmulatorSettings& settings);  // raises where there is none
bool emulator_checks_values();                              // true where there is none
uint64_t emulated_launches();                               // kernels that the emulator has started in this process

// --- Launching -------------------------------------------------------------------------------------------------------

// What launchers are told of the tensor's device, with its current stream and without a workspace.
DeviceLaunch make_launch(const at::Tensor& tensor);

// Memory for partial results on the tensor's device, noted in `launch`; keep the result until the launcher returned.
at::Tensor make_workspace(const at::Tensor& tensor, size_t bytes, DeviceLaunch& launch);

// The emulator's stand-in for a CUDA graph (graph_emulated.cpp): while it records, what a call does to memory is kept
// as steps that can be run again.
bool recording_graph();
void record_step(std::function<void()> step);

template <typename Params>
using Launcher = const char* (*)(const Params& p, const DeviceLaunch& launch);
template <typename Params>
using WorkspaceBytes = size_t (*)(const Params& p, const DeviceLaunch& launch);

// launcher(p, launch) on the tensor's device and its current stream, without waiting for it; raises what it returns.
template <typename Params>
void run_on_device(const char* op, const at::Tensor& tensor, Launcher<Params> launcher, const Params& p,
                   WorkspaceBytes<Params> workspace_bytes = nullptr) {
  const c10::OptionalDeviceGuard guard(tensor.device());
  DeviceLaunch launch = make_launch(tensor);
  at::Tensor workspace;
  if (workspace_bytes != nullptr) workspace = make_workspace(tensor, workspace_bytes(p, launch), launch);
  const char* error = launcher(p, launch);
  TORCH_CHECK(error == nullptr, op, ": ", error, ".");
  if (recording_graph()) {
    record_step([op, launcher, p, launch, workspace] {
      const char* later_error = launcher(p, launch);
      TORCH_CHECK(later_error == nullptr, op, ": ", later_error, ".");
    });
  }
}

}  // namespace fastattn
