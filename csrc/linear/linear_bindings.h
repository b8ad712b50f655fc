// Registered with the module _C by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

void bind_linear(pybind11::module_& m);

}  // namespace fastattn
