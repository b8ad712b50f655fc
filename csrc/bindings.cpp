// The pybind11 module fastattn._C: facts about the build and the processor. Importing it also loads the ops of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

namespace fastattn {
namespace {

constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

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
  throw std::invalid_argument("set_cpu_isa: unknown instruction set '" + name + "'; use portable, avx2 or avx512.");
}

std::map<std::string, std::string> build_info() {
  return {{"torch", FASTATTN_TORCH_VERSION}, {"compiler", __VERSION__}};
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
      "The build of the CPU kernels in use: 'portable', 'avx2' or 'avx512'.");
  m.def("set_cpu_isa", &fastattn::set_cpu_isa, pybind11::arg("name"),
        "Switches the whole process to one build of the CPU kernels (for tests and comparisons).");
}
