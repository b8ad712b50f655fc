// The C face of the emulator's settings, for Python.
#include <cstdint>

#include "emulator/launch.h"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

FASTATTN_EXPORT void fastattn_emulator_configure(int schedule, int async_mode, uint64_t seed, int os_threads,
                                                 int rough_approximations) {
  using namespace fastattn::emu;
  config() = {static_cast<Schedule>(schedule), static_cast<AsyncMode>(async_mode), seed, os_threads};
  config().rough_approximations = rough_approximations != 0;
}

FASTATTN_EXPORT void fastattn_emulator_declare_global(const void* begin, uint64_t bytes) {
  fastattn::emu::declare_global(begin, bytes);
}

FASTATTN_EXPORT void fastattn_emulator_forget_globals() { fastattn::emu::forget_globals(); }

FASTATTN_EXPORT uint64_t fastattn_emulator_switches() { return fastattn::emu::switches_of_last_launch(); }

FASTATTN_EXPORT void fastattn_emulator_ask_for_compiled(fastattn::emu::CompiledKernels compiled_kernels) {
  fastattn::emu::ask_for_compiled_kernels(compiled_kernels);
}

// Runs a kernel that has no launcher: null, or what went wrong.
FASTATTN_EXPORT const char* fastattn_emulator_run_compiled(const fastattn::emu::CompiledKernel* compiled,
                                                           const uint8_t* parameters, const unsigned* grid,
                                                           unsigned threads, uint64_t shared_bytes) {
  using namespace fastattn::emu;
  const std::vector<uint8_t> bytes(parameters, parameters + compiled->parameter_bytes);
  return keep_error(run_compiled(*compiled, dim3(grid[0], grid[1], grid[2]), dim3(1, 1, 1), dim3(threads, 1, 1),
                                 {shared_bytes, true}, bytes));
}
