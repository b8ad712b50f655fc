// The pybind11 module fastattn._C: facts about the build and the processor, the emulator's switch, the short ways
// to ops. Importing it also loads the ops of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention_bindings.h"
#include "common/device_launch.h"
#include "common/isa.h"
#include "encoder_layer/encoder_layer_bindings.h"
#include "int8_matmul/int8_linear_bindings.h"
#include "layer_norm/layer_norm_bindings.h"
#include "linear/linear_bindings.h"

namespace fastattn {
namespace {

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas) {
    if (isa_is_usable(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  for (Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    if (!isa_is_usable(isa))
      throw std::invalid_argument("set_cpu_isa: this machine cannot run the build '" + name + "'.");
    set_active_isa(isa);
    return;
  }
  throw std::invalid_argument("set_cpu_isa: unknown instruction set '" + name +
                              "'; use portable, avx2, avx512 or avx512_bf16.");
}

std::map<std::string, std::string> build_info() {
  return {{"torch", FASTATTN_TORCH_VERSION},
          {"compiler", __VERSION__},
          {"cuda_kernels", has_cuda_kernels() ? "device" : "emulated"},
          {"cuda_architectures", cuda_architectures()}};
}

// A Python context manager: `with _C.Emulation(True): ...`
class Emulation {
 public:
  explicit Emulation(bool on) : on_(on) {
    if (on && has_cuda_kernels()) throw std::invalid_argument("Emulation: this build has no emulator.");
  }
  void enter() { scope_.emplace(on_); }
  void exit() { scope_.reset(); }

 private:
  bool on_;
  std::optional<EmulationScope> scope_;
};

void bind_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Emulation>(m, "Emulation",
                        "While entered, ops of this thread on CPU tensors run the CUDA kernels emulated.")
      .def(py::init<bool>(), py::arg("on") = true)
      .def("__enter__", &Emulation::enter)
      .def("__exit__", [](Emulation& self, const py::args&) { self.exit(); });
  m.def("emulating", &emulating, "Whether such an Emulation is entered.");
  m.def("emulated_launches", &emulated_launches, "How many kernels the emulator has started in this process.");
  const EmulatorSettings defaults;
  m.def(
      "configure_emulator",
      [](int schedule, int async_mode, uint64_t seed, int os_threads, int compute_capability, int multiprocessors,
         bool checks_values, bool takes_gpu_tensors, bool rough_approximations) {
        configure_emulator({schedule, async_mode, seed, os_threads, compute_capability, multiprocessors, checks_values,
                            takes_gpu_tensors, rough_approximations});
      },
      py::kw_only(), py::arg("schedule") = defaults.schedule, py::arg("async_mode") = defaults.async_mode,
      py::arg("seed") = defaults.seed, py::arg("os_threads") = defaults.os_threads,
      py::arg("compute_capability") = defaults.compute_capability,
      py::arg("multiprocessors") = defaults.multiprocessors, py::arg("checks_values") = defaults.checks_values,
      py::arg("takes_gpu_tensors") = defaults.takes_gpu_tensors,
      py::arg("rough_approximations") = defaults.rough_approximations,
      "How emulated kernels run from now on, in the whole process, and which device they are told of. "
      "csrc/emulator/config.h explains the numbers; os_threads 0 = one a core. What is not given is reset.");
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts and CPU capability of the fastattn extension.";
  m.def("build_info", &fastattn::build_info, "Versions that the extension was compiled with and against.");
  m.def("usable_cpu_isas", &fastattn::usable_isas,
        "Builds of the CPU kernels that this machine can run, slowest first.");
  m.def(
      "active_cpu_isa", [] { return std::string(fastattn::isa_name(fastattn::active_isa())); },
      "The build of the CPU kernels in use: 'portable', 'avx2', 'avx512' or 'avx512_bf16'.");
  m.def("set_cpu_isa", &fastattn::set_cpu_isa, pybind11::arg("name"),
        "Switches the whole process to one build of the CPU kernels (for tests and comparisons).");
  fastattn::bind_emulator(m);
  fastattn::bind_attention(m);
  fastattn::bind_int8_linear(m);
  fastattn::bind_encoder_layer(m);
  fastattn::bind_layer_norm(m);
  fastattn::bind_linear(m);
}
