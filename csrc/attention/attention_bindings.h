// What bindings.cpp takes from here, and others that call attention in C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace fastattn {

// The op attention without masks other than the causal one, without its lse.
at::Tensor attend_without_mask(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool is_causal,
                               double scale);

void bind_attention(pybind11::module_& m);

}  // namespace fastattn
