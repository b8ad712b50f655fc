// Short ways from Python to the ops layer_norm and add_layer_norm, for usual calls: plain tensors on the CPU whose
// shapes agree. Checking them in Python, choosing the backend and matching the arguments to the schema take as long as
// 64 rows of 768 do.
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

// What all norms take, as their ops have it.
struct Norm {
  int64_t dims;
  OptionalTensor weight, bias;
  double eps;
};

std::optional<Norm> take_norm(const Tensor& input, const py::handle& shape, const py::handle& weight,
                              const py::handle& bias, const py::handle& eps, bool rms) {
  Norm norm;
  if (PyFloat_CheckExact(eps.ptr())) {
    norm.eps = PyFloat_AS_DOUBLE(eps.ptr());
  } else if (rms && eps.is_none()) {
    const bool wide = input.scalar_type() == at::kDouble;
    norm.eps = wide ? std::numeric_limits<double>::epsilon() : double{std::numeric_limits<float>::epsilon()};
  } else {
    return std::nullopt;
  }
  norm.dims = matching_dims(input, shape);
  if (norm.dims == 0) return std::nullopt;
  const at::IntArrayRef normalized = input.sizes().slice(input.dim() - norm.dims);
  if (!take_parameter(norm.weight, weight, normalized) || !take_parameter(norm.bias, bias, normalized)) {
    return std::nullopt;
  }
  return norm;
}

bool is_operand(const py::handle& object) {
  if (!is_plain_tensor(object)) return false;
  const Tensor& tensor = THPVariable_Unpack(object.ptr());
  return is_dense_on_cpu(tensor) && has_kernel(tensor.scalar_type());
}

py::object norm_if_plain(const py::handle& input, const py::handle& shape, const py::handle& weight,
                         const py::handle& bias, const py::handle& eps, bool rms) {
  using Outputs = std::tuple<Tensor, Tensor, Tensor>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastattn::layer_norm", "")
          .typed<Outputs(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool)>();
  if (!is_operand(input) || calls_are_watched()) return py::none();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  const std::optional<Norm> norm = take_norm(x, shape, weight, bias, eps, rms);
  if (!norm) return py::none();
  return to_python(
      without_gil([&] { return std::get<0>(op.call(x, norm->weight, norm->bias, norm->dims, norm->eps, rms)); }));
}

// Without dropout: (output, new_residual).
py::object add_norm_if_plain(const py::handle& input, const py::handle& residual, const py::handle& shape,
                             const py::handle& weight, const py::handle& bias, const py::handle& eps, bool rms) {
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::add_layer_norm", "")
                             .typed<Outputs(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, double, int64_t, double, bool)>();
  if (!is_operand(input) || !is_operand(residual) || calls_are_watched()) return py::none();
  const Tensor &x = THPVariable_Unpack(input.ptr()), &r = THPVariable_Unpack(residual.ptr());
  if (x.scalar_type() != r.scalar_type() || x.sizes() != r.sizes()) return py::none();
  const std::optional<Norm> norm = take_norm(x, shape, weight, bias, eps, rms);
  if (!norm) return py::none();
  const Outputs outputs = without_gil([&] {
    return op.call(x, r, norm->weight, norm->bias, /*rng_state=*/std::nullopt, /*dropout_p=*/0.0, norm->dims, norm->eps,
                   rms);
  });
  return py::make_tuple(to_python(std::get<0>(outputs)), to_python(std::get<1>(outputs)));
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  using Handle = const py::handle&;
  m.def(
      "layer_norm_if_plain",
      [](Handle input, Handle shape, Handle weight, Handle bias, Handle eps) {
        return norm_if_plain(input, shape, weight, bias, eps, /*rms=*/false);
      },
      "The op layer_norm on the CPU (input, normalized_shape, weight, bias, eps), or None where an argument wants a "
      "closer look or somebody has to see the call.");
  m.def(
      "rms_norm_if_plain",
      [](Handle input, Handle shape, Handle weight, Handle eps) {
        return norm_if_plain(input, shape, weight, py::none(), eps, /*rms=*/true);
      },
      "The op layer_norm of RMS norm on the CPU (input, normalized_shape, weight, eps), or None likewise.");
  m.def(
      "add_layer_norm_if_plain",
      [](Handle input, Handle residual, Handle shape, Handle weight, Handle bias, Handle eps) {
        return add_norm_if_plain(input, residual, shape, weight, bias, eps, /*rms=*/false);
      },
      "The op add_layer_norm on the CPU without dropout (input, residual, normalized_shape, weight, bias, eps), or "
      "None likewise.");
  m.def(
      "add_rms_norm_if_plain",
      [](Handle input, Handle residual, Handle shape, Handle weight, Handle eps) {
        return add_norm_if_plain(input, residual, shape, weight, py::none(), eps, /*rms=*/true);
      },
      "The op add_layer_norm of RMS norm on the CPU (input, residual, normalized_shape, weight, eps), or None "
      "likewise.");
}

}  // namespace fastattn
