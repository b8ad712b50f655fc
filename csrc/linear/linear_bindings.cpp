// The short way from Python to the op linear. It also decides, in less time than Python takes to look at a shape,
// whether a call is one for the kernel: a decoder asks a hundred times a token.
#include "linear/linear_bindings.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "common/check.h"
#include "common/memory.h"
#include "common/python_tensor.h"
#include "linear/linear.h"

namespace fastattn {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool is_taken(const Tensor& tensor, at::ScalarType dtype) {
  return is_dense_on_cpu(tensor) && tensor.scalar_type() == dtype;
}

bool is_faster(const Tensor& input) {
  const at::ScalarType dtype = input.scalar_type();
  const int64_t depth = input.size(-1);
  return has_kernel(dtype) && dtype != at::kDouble && depth > 0 &&
         input.numel() / depth <= linear_max_rows(kernel_dtype("linear", dtype));
}

py::object linear_if_faster(const py::handle& input, const py::handle& weight, const py::handle& bias,
                            const char* activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::linear", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>();
  if (!is_plain_tensor(input) || !is_plain_tensor(weight) || calls_are_watched() ||
      at::autocast::is_autocast_enabled(at::kCPU)) {
    return py::none();
  }
  const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  const at::ScalarType dtype = x.scalar_type();
  if (!is_taken(x, dtype) || !is_taken(w, dtype) || x.dim() < 1 || !is_faster(x)) return py::none();
  OptionalTensor b;
  if (!bias.is_none()) {
    if (!is_plain_tensor(bias)) return py::none();
    b = THPVariable_Unpack(bias.ptr());
    if (!is_taken(*b, dtype)) return py::none();
  }
  return to_python(without_gil([&] { return op.call(x, w, b, activation); }));
}

void gather_weight(const Tensor& weight) {
  if (!weight.is_cpu() || weight.layout() != at::kStrided || weight.is_nested() || !weight.is_contiguous()) return;
  const pybind11::gil_scoped_release other_threads_run;
  gather_into_huge_pages(weight.const_data_ptr(), static_cast<int64_t>(weight.nbytes()));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_if_faster", &linear_if_faster,
        "The op linear (input, weight, bias, activation), or None where PyTorch's product is faster or the op cannot "
        "serve: another device or dtype, autocast, somebody who has to see the call.");
  m.def("gather_weight", &gather_weight,
        "Moves a contiguous weight on the CPU onto 2 MiB pages where the system can; its bytes and address stay.");
}

}  // namespace fastattn
