// For the short ways from Python to an op, which leave whatever is unusual to the general way.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace fastattn {

// Whether `object` is a torch.Tensor and of no subclass.
inline bool is_plain_tensor(const pybind11::handle& object) { return THPVariable_CheckExact(object.ptr()); }

// The dtypes of the floating kernels.
inline bool has_kernel(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

inline bool is_dense_on_cpu(const at::Tensor& tensor) {
  return tensor.is_cpu() && !tensor.is_nested() && tensor.layout() == at::kStrided && tensor.is_floating_point();
}

// Whether a transform of torch.func or forward-mode differentiation is on: the kernels have no rules for them.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Whether somebody besides the dispatcher has a say in calls: a mode of torch functions, a trace, a transform.
inline bool calls_are_watched() {
  return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing() || is_transformed();
}

// What `call` gives, while Python's other threads run.
template <typename Call>
auto without_gil(Call&& call) {
  const pybind11::gil_scoped_release other_threads_run;
  return call();
}

inline pybind11::object to_python(at::Tensor tensor) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(tensor)));
}

}  // namespace fastattn
