// Short ways from Python to the op layer_norm, for usual calls: plain tensors on the CPU whose shapes agree.
// Checking them in Python, choosing the backend and matching the arguments to the schema take as long as 64 rows of 768
// do.
#include "layer_norm/layer_norm_bindings.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>
#include <optional>
#include <tuple>

#include "common/python_tensor.h"

namespace fastattn {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether `size` is the integer `expected`.
bool is_size(PyObject* size, int64_t expected) {
  int overflows = 0;  // the value is -1 then, which is no size
  return PyLong_CheckExact(size) && PyLong_AsLongLongAndOverflow(size, &overflows) == expected;
}

// The trailing dims of `input` that are `shape`, an integer or a tuple of integers; 0 if they are not.
int64_t matching_dims(const Tensor& input, const py::handle& shape) {
  if (!PyTuple_Check(shape.ptr())) return input.dim() > 0 && is_size(shape.ptr(), input.size(-1)) ? 1 : 0;
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims > input.dim()) return 0;
  for (Py_ssize_t i = 0; i < dims; ++i) {
    if (!is_size(PyTuple_GET_ITEM(shape.ptr(), i), input.size(input.dim() - dims + i))) return 0;
  }
  return dims;
}

// Whether `object` is None or a parameter that the op takes; then `parameter` holds it.
bool take_parameter(OptionalTensor& parameter, const py::handle& object, at::IntArrayRef shape) {
  if (object.is_none()) return true;
  if (!is_plain_tensor(object)) return false;
  parameter = THPVariable_Unpack(object.ptr());
  return is_dense_on_cpu(*parameter) && parameter->sizes() == shape;
}

py::object norm_if_plain(const py::handle& object, const py::handle& shape, const py::handle& weight,
                         const py::handle& bias, double eps, bool rms) {
  using Outputs = std::tuple<Tensor, Tensor, Tensor>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastattn::layer_norm", "")
          .typed<Outputs(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool)>();
  const Tensor& input = THPVariable_Unpack(object.ptr());
  if (!is_dense_on_cpu(input) || !has_kernel(input.scalar_type())) return py::none();
  const int64_t dims = matching_dims(input, shape);
  if (dims == 0) return py::none();
  const at::IntArrayRef normalized = input.sizes().slice(input.dim() - dims);
  OptionalTensor weights, biases;
  if (!take_parameter(weights, weight, normalized) || !take_parameter(biases, bias, normalized)) return py::none();
  return call_without_gil([&] { return std::get<0>(op.call(input, weights, biases, dims, eps, rms)); });
}

py::object layer_norm_if_plain(const py::handle& input, const py::handle& shape, const py::handle& weight,
                               const py::handle& bias, const py::handle& eps) {
  if (!is_plain_tensor(input) || !PyFloat_CheckExact(eps.ptr()) || calls_are_watched()) return py::none();
  return norm_if_plain(input, shape, weight, bias, PyFloat_AS_DOUBLE(eps.ptr()), /*rms=*/false);
}

py::object rms_norm_if_plain(const py::handle& input, const py::handle& shape, const py::handle& weight,
                             const py::handle& eps) {
  if (!is_plain_tensor(input) || calls_are_watched()) return py::none();
  double value = 0.0;
  if (PyFloat_CheckExact(eps.ptr())) {
    value = PyFloat_AS_DOUBLE(eps.ptr());
  } else if (eps.is_none()) {
    const bool wide = THPVariable_Unpack(input.ptr()).scalar_type() == at::kDouble;
    value = wide ? std::numeric_limits<double>::epsilon() : double{std::numeric_limits<float>::epsilon()};
  } else {
    return py::none();
  }
  return norm_if_plain(input, shape, weight, py::none(), value, /*rms=*/true);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm_if_plain", &layer_norm_if_plain,
        "The op layer_norm on the CPU (input, normalized_shape, weight, bias, eps), or None where an argument wants a "
        "closer look or somebody has to see the call.");
  m.def("rms_norm_if_plain", &rms_norm_if_plain,
        "The op layer_norm of RMS norm on the CPU (input, normalized_shape, weight, eps), or None likewise.");
}

}  // namespace fastattn
