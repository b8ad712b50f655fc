// Short ways from Python to the op attention, for usual calls: plain tensors on the CPU whose shapes agree, without
// masks other than the causal one, and a decoder's step. Checking them in Python, choosing the backend and matching the
// arguments to the schema take as long as the attention of 12 heads over 16 keys.
#include "attention/attention_bindings.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
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

bool is_scale(const py::handle& scale) { return scale.is_none() || PyFloat_CheckExact(scale.ptr()); }

double scale_of(const py::handle& scale, const Tensor& query) {
  return scale.is_none() ? std::pow(static_cast<double>(query.size(3)), -0.5) : PyFloat_AS_DOUBLE(scale.ptr());
}

py::object attention_if_plain(const py::handle& query, const py::handle& key, const py::handle& value,
                              const py::handle& is_causal, const py::handle& scale, const py::handle& enable_gqa) {
  if (!is_plain_tensor(query) || !is_plain_tensor(key) || !is_plain_tensor(value) || !PyBool_Check(is_causal.ptr()) ||
      !PyBool_Check(enable_gqa.ptr()) || !is_scale(scale) || calls_are_watched() ||
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
  const double factor = scale_of(scale, q);
  return to_python(without_gil([&] { return attend_without_mask(q, k, v, is_causal.ptr() == Py_True, factor); }));
}

// --- One token behind a cache ----------------------------------------------------------------------------------------

// expand() gives several elements one memory, by strides of 0.
bool is_expanded(const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.stride(dim) == 0 && tensor.size(dim) > 1) return true;
  }
  return false;
}

// `step` is (batch, 1, heads, head_dim) and `cache` has room for it behind its first `length` tokens.
bool fits_behind(const Tensor& step, const Tensor& cache, int64_t length) {
  return !is_expanded(cache) && step.size(0) == cache.size(0) && step.size(1) == 1 && step.size(2) == cache.size(2) &&
         step.size(3) == cache.size(3) && length >= 0 && length < cache.size(1);
}

// The first `length` tokens as attention has them, (batch, heads, length, head_dim), once `step` is the last of them.
Tensor extended(const Tensor& cache, const Tensor& step, int64_t length) {
  cache.narrow(1, length - 1, 1).copy_(step);
  return cache.narrow(1, 0, length).transpose(1, 2);
}

// The one query is the last key's: it sees them all, causal or not. Nothing is written before everything is checked.
py::object one_token_if_plain(const py::handle& query, const py::handle& key_cache, const py::handle& value_cache,
                              const py::handle& key, const py::handle& value, const py::handle& cache_seqlen,
                              const py::handle& scale) {
  const std::array<const py::handle*, 5> objects = {&query, &key_cache, &value_cache, &key, &value};
  for (const py::handle* object : objects) {
    if (!is_plain_tensor(*object)) return py::none();
  }
  if (!PyLong_CheckExact(cache_seqlen.ptr()) || !is_scale(scale) || calls_are_watched() ||
      at::autocast::is_autocast_enabled(at::kCPU)) {
    return py::none();
  }
  const at::ScalarType dtype = THPVariable_Unpack(query.ptr()).scalar_type();
  if (!has_kernel(dtype)) return py::none();
  for (const py::handle* object : objects) {
    const Tensor& tensor = THPVariable_Unpack(object->ptr());
    if (!is_operand(tensor, dtype) || (at::GradMode::is_enabled() && tensor.requires_grad())) return py::none();
  }
  const Tensor &q = THPVariable_Unpack(query.ptr()), &keys = THPVariable_Unpack(key_cache.ptr()),
               &values = THPVariable_Unpack(value_cache.ptr()), &k = THPVariable_Unpack(key.ptr()),
               &v = THPVariable_Unpack(value.ptr());
  int overflows = 0;  // the value is -1 then, which is no length
  const int64_t length = PyLong_AsLongLongAndOverflow(cache_seqlen.ptr(), &overflows);
  const int64_t heads = q.size(2), heads_kv = keys.size(2);
  if (!fits_behind(k, keys, length) || !fits_behind(v, values, length) || q.size(0) != keys.size(0) || q.size(1) != 1 ||
      q.size(3) != keys.size(3) || keys.sizes().slice(0, 3) != values.sizes().slice(0, 3) || heads_kv == 0 ||
      heads % heads_kv != 0) {
    return py::none();
  }
  const double factor = scale_of(scale, q);
  return to_python(without_gil([&] {
    const Tensor all_keys = extended(keys, k, length + 1), all_values = extended(values, v, length + 1);
    return attend_without_mask(q.transpose(1, 2), all_keys, all_values, /*is_causal=*/false, factor).transpose(1, 2);
  }));
}

}  // namespace

Tensor attend_without_mask(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  using Outputs = std::tuple<Tensor, Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::attention", "")
                             .typed<Outputs(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                                            bool, double, c10::SymInt, c10::SymInt, bool, double)>();
  return std::get<0>(op.call(query, key, value, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                             /*dropout_p=*/0.0, is_causal, scale, /*window_left=*/-1, /*window_right=*/-1,
                             /*bottom_right=*/false, /*softcap=*/0.0));
}

void bind_attention(py::module_& m) {
  m.def("attention_if_plain", &attention_if_plain,
        "The op attention on the CPU (query, key, value, is_causal, scale, enable_gqa), without lse, or None where an "
        "argument wants a closer look or somebody has to see the call.");
  m.def("one_token_if_plain", &one_token_if_plain,
        "attention_with_kv_cache of one token behind one number of tokens on the CPU (query, key_cache, value_cache, "
        "key, value, cache_seqlen, scale), or None likewise.");
}

}  // namespace fastattn
