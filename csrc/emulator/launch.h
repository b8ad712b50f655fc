// Starting an emulated kernel. Kernels use launch_kernel of common/launch.cuh.
#pragma once

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "emulator/config.h"
#include "emulator/cuda.h"

namespace fastattn::emu {

// Of a launch. A device knows by a kernel's attributes whether it was asked for more than 48 KiB.
struct SharedMemory {
  size_t dynamic_bytes = 0;
  bool asks_for_more = false;
};

// Empty, or why a device might refuse one of the kernel's launches. What a kernel may have is an attribute of it, which
// every launch that asks for more than 48 KiB sets: where launches differ, one thread's takes away what another's
// needs.
std::string shared_request_problem(const void* kernel, SharedMemory shared);

// Runs `body` once for each thread of the grid; empty if all went well, else what went wrong in which block.
std::string run_grid(dim3 grid, dim3 cluster, dim3 block, SharedMemory shared, const std::function<void()>& body);

// ---- kernels as nvcc compiled them, in place of what the C++ compiler made of the same source (tests/compiled.py)

struct CompiledKernel {
  void (*body)(uint8_t* parameters) = nullptr;
  size_t parameter_bytes = 0;
};
// Fills in what nvcc made of a kernel, or leaves it empty; null, or why it failed.
using CompiledKernels = const char* (*)(const void* kernel, CompiledKernel* compiled);
// Asked at each launch from now on; null for nobody.
void ask_for_compiled_kernels(CompiledKernels compiled_kernels);
const char* find_compiled(const void* kernel, CompiledKernel& compiled);

// Parameters one after another, as nvcc lays them out.
template <typename... Parameters>
std::vector<uint8_t> parameter_bytes(const std::tuple<Parameters...>& parameters) {
  std::vector<uint8_t> bytes;
  const auto append = [&bytes]<typename Parameter>(const Parameter& parameter) {
    bytes.resize((bytes.size() + alignof(Parameter) - 1) / alignof(Parameter) * alignof(Parameter));
    const auto* first = reinterpret_cast<const uint8_t*>(&parameter);
    bytes.insert(bytes.end(), first, first + sizeof parameter);
  };
  std::apply([&](const auto&... each) { (append(each), ...); }, parameters);
  return bytes;
}
std::string run_compiled(const CompiledKernel& compiled, dim3 grid, dim3 cluster, dim3 block, SharedMemory shared,
                         const std::vector<uint8_t>& parameters);

// Keeps the text alive until this OS thread's next launch. Null for an empty one.
const char* keep_error(std::string text);

// The arguments are converted once and passed by value to every thread, as on the device.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 cluster, dim3 block, SharedMemory shared,
                   Arguments&&... arguments) {
  std::string problem = shared_request_problem(reinterpret_cast<const void*>(kernel), shared);
  if (!problem.empty()) return keep_error(std::move(problem));
  const std::tuple<Parameters...> parameters{static_cast<Parameters>(arguments)...};
  CompiledKernel compiled;
  if (const char* error = find_compiled(reinterpret_cast<const void*>(kernel), compiled)) return keep_error(error);
  if (compiled.body != nullptr) {
    return keep_error(run_compiled(compiled, grid, cluster, block, shared, parameter_bytes(parameters)));
  }
  return keep_error(run_grid(grid, cluster, block, shared, [kernel, &parameters] { std::apply(kernel, parameters); }));
}

// Once any range is declared, asynchronous copies must stay within the declared ranges (tests declare their tensors).
void declare_global(const void* begin, size_t bytes);
void forget_globals();

uint64_t switches_of_last_launch();
uint64_t launches();  // of this process, refused ones not counted

}  // namespace fastattn::emu
