// For the short ways from Python to an op, which leave whatever is unusual to the general way.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

namespace fastattn {

// Whether `object` is a torch.Tensor and of no subclass.
inline bool is_plain_tensor(const pybind11::handle& object) { return THPVariable_CheckExact(object.ptr()); }

inline bool is_dense_on_cpu(const at::Tensor& tensor) {
  return tensor.is_cpu() && !tensor.is_nested() && tensor.layout() == at::kStrided && tensor.is_floating_point();
}

// Whether somebody besides the dispatcher has a say in calls: a mode of torch functions, a trace.
inline bool calls_are_watched() { return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing(); }

}  // namespace fastattn
