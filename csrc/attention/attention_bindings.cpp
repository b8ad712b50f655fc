// A short way from Python to the op attention, for the usual call: plain tensors on the CPU whose shapes agree, without
// masks other than the causal one. Checking them in Python, choosing the backend and matching the arguments to the
// schema take as long as the attention of 12 heads over 16 keys.
#include "attention/attention_bindings.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/python_tensor.h"

namespace fastattn {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxHeadDim = 256;

bool is_operand(const Tensor& tensor, at::ScalarType dtype) {
  return is_dense_on_cpu(tensor) && tensor.dim() == 4 && tensor.scalar_type() == dtype && tensor.size(3) >= 1 &&
         tensor.size(3) <= kMaxHeadDim;
}

bool shapes_agree(const Tensor& query, const Tensor& key, const Tensor& value, bool enable_gqa) {
  const int64_t heads = query.size(1), heads_kv = key.size(1);
  return query.size(0) == key.size(0) && query.size(3) == key.size(3) &&
         key.sizes().slice(0, 3) == value.sizes().slice(0, 3) &&
         (heads == heads_kv || (enable_gqa && heads_kv > 0 && heads % heads_kv == 0));
}

py::object attention_if_plain(const py::handle& query, const py::handle& key, const py::handle& value,
                              const py::handle& is_causal, const py::handle& scale, const py::handle& enable_gqa) {
  using Outputs = std::tuple<Tensor, Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::attention", "")
                             .typed<Outputs(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                                            bool, double, c10::SymInt, c10::SymInt, bool, double)>();
  if (!is_plain_tensor(query) || !is_plain_tensor(key) || !is_plain_tensor(value) || !PyBool_Check(is_causal.ptr()) ||
      !PyBool_Check(enable_gqa.ptr()) || !(scale.is_none() || PyFloat_CheckExact(scale.ptr())) || calls_are_watched() ||
      at::autocast::is_autocast_enabled(at::kCPU)) {
    return py::none();
  }
  const Tensor &q = THPVariable_Unpack(query.ptr()), &k = THPVariable_Unpack(key.ptr()),
               &v = THPVariable_Unpack(value.ptr());
  const at::ScalarType dtype = q.scalar_type();
  if (!has_kernel(dtype) || !is_operand(q, dtype) || !is_operand(k, dtype) || !is_operand(v, dtype) ||
      !shapes_agree(q, k, v, enable_gqa.ptr() == Py_True)) {
    return py::none();
  }
  const double factor =
      scale.is_none() ? std::pow(static_cast<double>(q.size(3)), -0.5) : PyFloat_AS_DOUBLE(scale.ptr());
  return call_without_gil([&] {
    return std::get<0>(op.call(q, k, v, std::nullopt, std::nullopt, std::nullopt, std::nullopt, /*dropout_p=*/0.0,
                               is_causal.ptr() == Py_True, factor, /*window_left=*/-1, /*window_right=*/-1,
                               /*bottom_right=*/false, /*softcap=*/0.0));
  });
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_if_plain", &attention_if_plain,
        "The op attention on the CPU (query, key, value, is_causal, scale, enable_gqa), without lse, or None where an "
        "argument wants a closer look or somebody has to see the call.");
}

}  // namespace fastattn
