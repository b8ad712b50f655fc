// Kernels as nvcc compiled them: a test gives the function that its PTX was turned into.
#include <atomic>
#include <cstring>

#include "emulator/launch.h"
#include "emulator/memory.h"

namespace fastattn::emu {

static std::atomic<CompiledKernels> asked = nullptr;

void ask_for_compiled_kernels(CompiledKernels compiled_kernels) { asked = compiled_kernels; }

const char* find_compiled(const void* kernel, CompiledKernel& compiled) {
  const CompiledKernels compiled_kernels = asked;
  return compiled_kernels == nullptr ? nullptr : compiled_kernels(kernel, &compiled);
}

std::string run_compiled(const CompiledKernel& compiled, dim3 grid, dim3 cluster, dim3 block, SharedMemory shared,
                         const std::vector<uint8_t>& parameters) {
  if (parameters.size() != compiled.parameter_bytes) {
    return "launch: " + std::to_string(parameters.size()) + " bytes of parameters, where nvcc has " +
           std::to_string(compiled.parameter_bytes);
  }
  const GuardedMemory memory(parameters.size());  // aligned to a page
  std::memcpy(memory.data(), parameters.data(), parameters.size());
  return run_grid(grid, cluster, block, shared, [&] { compiled.body(memory.data()); });
}

}  // namespace fastattn::emu
