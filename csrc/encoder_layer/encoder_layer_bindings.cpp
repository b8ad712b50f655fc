// A whole encoder layer with INT8 projections in one call from Python. Around 15 tokens of 384 the ops of a layer take
// 75 us; calling them one by one from modules adds 25, in which the other threads fall asleep if many compete.
#include "encoder_layer/encoder_layer_bindings.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "attention/attention_bindings.h"
#include "common/python_tensor.h"
#include "encoder_layer/watched_modules.h"

namespace fastattn {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// act(int8_linear(x)), of a packed weight.
struct Projection {
  Tensor packed, weight, scale;
  OptionalTensor bias;
  std::string activation;

  explicit Projection(const py::tuple& from)
      : packed(from[0].cast<Tensor>()),
        weight(from[1].cast<Tensor>()),
        scale(from[2].cast<Tensor>()),
        bias(from[3].cast<OptionalTensor>()),
        activation(from[4].cast<std::string>()) {}

  Tensor operator()(const Tensor& x) const {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastattn::int8_linear_packed", "")
                               .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             const OptionalTensor&, c10::string_view)>();
    return op.call(x, packed, weight, scale, bias, activation);
  }

  int64_t columns() const { return weight.size(0); }
};

struct Norm {
  OptionalTensor weight, bias;
  double eps;

  explicit Norm(const py::tuple& from)
      : weight(from[0].cast<OptionalTensor>()), bias(from[1].cast<OptionalTensor>()), eps(from[2].cast<double>()) {}

  Tensor operator()(const Tensor& x) const {
    using Outputs = std::tuple<Tensor, Tensor, Tensor>;
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fastattn::layer_norm", "")
            .typed<Outputs(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool)>();
    return std::get<0>(op.call(x, weight, bias, /*normalized_dims=*/1, eps, /*rms=*/false));
  }

  // The norm of x + branch, and the sum.
  std::tuple<Tensor, Tensor> of_sum(const Tensor& branch, const Tensor& x) const {
    using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fastattn::add_layer_norm", "")
            .typed<Outputs(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, double, int64_t, double, bool)>();
    Outputs outputs = op.call(branch, x, weight, bias, /*rng_state=*/std::nullopt, /*dropout_p=*/0.0,
                              /*normalized_dims=*/1, eps, /*rms=*/false);
    return {std::move(std::get<0>(outputs)), std::move(std::get<1>(outputs))};
  }
};

// An nn.TransformerEncoderLayer in inference, without masks.
class Int8EncoderLayer {
 public:
  // projections: query, key, value, the three of them as one, output, and the two of the feed-forward network.
  Int8EncoderLayer(const py::list& watched, const py::list& hooks, const py::list& projections, const py::list& norms,
                   int64_t head_dim, bool norm_first, int64_t joint_bytes)
      : separate_{Projection(projections[0]), Projection(projections[1]), Projection(projections[2])},
        joint_(py::tuple(projections[3])),
        output_(py::tuple(projections[4])),
        expand_(py::tuple(projections[5])),
        contract_(py::tuple(projections[6])),
        norm1_(py::tuple(norms[0])),
        norm2_(py::tuple(norms[1])),
        head_dim_(head_dim),
        joint_bytes_(joint_bytes),
        norm_first_(norm_first) {
    for (const py::handle& entry : watched) {
      const auto [module, container, names] =
          entry.cast<std::tuple<py::object, std::string, std::vector<std::string>>>();
      watched_.watch(module, container.c_str(), names);
    }
    for (const py::handle& dict : hooks) watched_.watch_hooks(py::reinterpret_borrow<py::object>(dict));
  }

  bool is_current() const { return watched_.are_unchanged(); }

  // None where the call is for the modules: they have changed since, or somebody has to see it, or takes gradients, or
  // `input` is not (batch, seqlen, embed_dim) or (seqlen, embed_dim) in a plain tensor.
  py::object call(const py::handle& input) const {
    if (!is_plain_tensor(input) || calls_are_watched() || at::GradMode::is_enabled() ||
        at::autocast::is_autocast_enabled(at::kCPU)) {
      return py::none();
    }
    const Tensor& x = THPVariable_Unpack(input.ptr());
    if (!is_dense_on_cpu(x) || !has_kernel(x.scalar_type()) || (x.dim() != 2 && x.dim() != 3) ||
        x.size(-1) != output_.columns() || x.numel() == 0 || !is_current()) {
      return py::none();
    }
    return to_python(without_gil([&] { return norm_first_ ? norms_before(x) : norms_behind(x); }));
  }

 private:
  Tensor norms_behind(const Tensor& x) const {
    const Tensor attended = std::get<0>(norm1_.of_sum(output_(attend(x)), x));
    return std::get<0>(norm2_.of_sum(contract_(expand_(attended)), attended));
  }

  Tensor norms_before(const Tensor& x) const {
    const auto [normalized, sum] = norm2_.of_sum(output_(attend(norm1_(x))), x);
    return contract_(expand_(normalized)).add_(sum);
  }

  // The heads of `columns` columns of a projection from `first` on, as attention has them.
  Tensor heads(const Tensor& projected, int64_t first, int64_t columns) const {
    const int64_t batch = projected.dim() == 3 ? projected.size(0) : 1, seqlen = projected.size(-2),
                  stride = projected.size(-1);
    return at::as_strided(projected, {batch, columns / head_dim_, seqlen, head_dim_},
                          {seqlen * stride, head_dim_, stride, 1}, first);
  }

  // What the output projection takes.
  Tensor attend(const Tensor& x) const {
    std::array<Tensor, 3> operands;
    if (x.numel() / x.size(-1) * joint_.columns() * 4 < joint_bytes_) {
      const Tensor projected = joint_(x);
      int64_t first = 0;
      for (size_t i = 0; i < operands.size(); ++i) {
        operands[i] = heads(projected, first, separate_[i].columns());
        first += separate_[i].columns();
      }
    } else {
      for (size_t i = 0; i < operands.size(); ++i) operands[i] = heads(separate_[i](x), 0, separate_[i].columns());
    }
    const double scale = std::pow(static_cast<double>(head_dim_), -0.5);
    const Tensor out = attend_without_mask(operands[0], operands[1], operands[2], /*is_causal=*/false, scale);
    return out.transpose(1, 2).reshape(x.sizes());
  }

  std::array<Projection, 3> separate_;
  Projection joint_, output_, expand_, contract_;
  Norm norm1_, norm2_;
  int64_t head_dim_, joint_bytes_;
  bool norm_first_;
  WatchedModules watched_;
};

}  // namespace

void bind_encoder_layer(py::module_& m) {
  py::class_<Int8EncoderLayer>(m, "Int8EncoderLayer",
                               "What an nn.TransformerEncoderLayer of INT8 projections computes in inference, without "
                               "masks, made from its modules as they are.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, int64_t, bool, int64_t>(),
           py::arg("watched"), py::arg("hooks"), py::arg("projections"), py::arg("norms"), py::arg("head_dim"),
           py::arg("norm_first"), py::arg("joint_bytes"))
      .def("is_current", &Int8EncoderLayer::is_current, "Whether the modules are as they were, without hooks.")
      .def("__call__", &Int8EncoderLayer::call, "The layer's output, or None for a call that is for the modules.");
}

}  // namespace fastattn
