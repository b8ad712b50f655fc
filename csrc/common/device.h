// The face of the CUDA launchers, without CUDA headers: the torch glue calls them, nvcc or, for the emulator, the C++
// compiler builds them. A build of the extension holds one of the two, so both have the same names.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {

// Where a kernel runs, and what launchers choose their tiles and grids by.
struct DeviceLaunch {
  void* stream = nullptr;       // cudaStream_t; null in the emulator
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  size_t shared_bytes_per_block = 163 * 1024;  // with opt-in
  bool deterministic = false;                  // torch.are_deterministic_algorithms_enabled()
  // Global memory for partial results, 256-byte aligned, as large as the launcher's own <launcher>_workspace_bytes
  // says.
  void* workspace = nullptr;
};

// Launchers have the form `const char* attention_fwd_cuda(const AttentionParams& p, const DeviceLaunch& launch)`: null,
// or why the launch failed, a text that stays valid until this thread's next launch.

}  // namespace fastattn
