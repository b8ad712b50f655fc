// What bindings.cpp takes from here.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

void bind_encoder_layer(pybind11::module_& m);

}  // namespace fastattn
