// A short way from Python to the op int8_linear_packed. torch.ops matches arguments to the schema by the general
// machinery of TorchScript, which takes a microsecond and a half; here they arrive typed.
#include "int8_matmul/int8_linear_bindings.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "common/python_tensor.h"
#include "int8_matmul/int8_packed_weight.h"

namespace fastattn {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

py::object int8_linear_if_packed(const py::handle& input, const Tensor& packed, const py::handle& weight,
                                 const Tensor& weight_scale, const OptionalTensor& bias, const char* activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::int8_linear_packed", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, c10::string_view)>();
  if (!is_plain_tensor(input) || !is_plain_tensor(weight) || calls_are_watched()) return py::none();
  const Tensor &rows = THPVariable_Unpack(input.ptr()), &q = THPVariable_Unpack(weight.ptr());
  if (rows.is_nested() || !is_packed_form_of(packed, q)) return py::none();
  return to_python(without_gil([&] { return op.call(rows, packed, q, weight_scale, bias, activation); }));
}

}  // namespace

void bind_int8_linear(py::module_& m) {
  m.def("int8_linear_if_packed", &int8_linear_if_packed,
        "The op int8_linear_packed, or None where that would not use the packed weight, because the weight has changed "
        "since, or where somebody has to see the call.");
}

}  // namespace fastattn
