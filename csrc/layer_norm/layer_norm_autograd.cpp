// Gradients of the layer norm ops, for every device: the backward kernels are ops of their own.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/autograd_node.h"
#include "common/device_launch.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- The ops, called through the dispatcher --------------------------------------------------------------------------

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Outputs3 = std::tuple<Tensor, Tensor, Tensor>;
using Outputs4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LayerNormSignature = Outputs3(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool);
using LayerNormBackwardSignature = Outputs3(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const OptionalTensor&, int64_t, bool, bool, bool, OptionalDtype);
using AddLayerNormSignature = Outputs4(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, double, int64_t, double, bool);
using AddLayerNormBackwardSignature = Outputs4(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                               const Tensor&, const OptionalTensor&, const OptionalTensor&, double,
                                               int64_t, bool, bool, bool, OptionalDtype, at::ScalarType);

const auto& layer_norm_op() {
  static const auto op = find_op<LayerNormSignature>("fastattn::layer_norm");
  return op;
}
const auto& layer_norm_backward_op() {
  static const auto op = find_op<LayerNormBackwardSignature>("fastattn::layer_norm_backward");
  return op;
}
const auto& add_layer_norm_op() {
  static const auto op = find_op<AddLayerNormSignature>("fastattn::add_layer_norm");
  return op;
}
const auto& add_layer_norm_backward_op() {
  static const auto op = find_op<AddLayerNormBackwardSignature>("fastattn::add_layer_norm_backward");
  return op;
}

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

template <typename... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Autograd numbers the edges of the inputs that are defined tensors: `first` of them, then weight and bias.
struct ParamNeeds {
  ParamNeeds(AutogradContext* ctx, int first, bool has_weight, bool has_bias)
      : dweight(has_weight && ctx->needs_input_grad(first)),
        dbias(has_bias && ctx->needs_input_grad(first + (has_weight ? 1 : 0))) {}
  bool dweight, dbias;
};

// For a call that nobody differentiates: past the op's autograd kernel, which would find that out once more. Only
// around the op: hooks that unpack saved tensors are the user's code.
struct BelowAutogradWithoutGraph {
  BelowAutogradWithoutGraph() {
    if (!at::GradMode::is_enabled()) below.emplace();
  }
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
};

OptionalDtype dtype_of(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalDtype(tensor->scalar_type()) : std::nullopt;
}

OptionalDtype saved_dtype(AutogradContext* ctx) {
  const c10::IValue& saved = ctx->saved_data["bias_dtype"];
  return saved.isNone() ? std::nullopt : OptionalDtype(saved.toScalarType());
}

// The autograd Functions return only what has a gradient; mean and rstd leave through a pointer. (Marking outputs as
// not differentiable instead is what compiled autograd does not support.)

// --- layer_norm ------------------------------------------------------------------------------------------------------

struct LayerNormFunction : torch::autograd::Function<LayerNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, int64_t normalized_dims, double eps, bool rms,
                               Outputs3* outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *outputs = layer_norm_op().call(input, weight, bias, normalized_dims, eps, rms);
    const auto& [out, mean, rstd] = *outputs;
    ctx->save_for_backward({input, mean, rstd, weight.value_or(Tensor())});
    ctx->saved_data["emulating"] = emulating();
    ctx->saved_data["rms"] = rms;
    ctx->saved_data["normalized_dims"] = normalized_dims;
    ctx->saved_data["bias_dtype"] = dtype_of(bias);
    return {out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const EmulationScope scope(ctx->saved_data["emulating"].toBool());
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = if_defined(saved[3]);
    const OptionalDtype bias_dtype = saved_dtype(ctx);
    const ParamNeeds need(ctx, 1, weight.has_value(), bias_dtype.has_value());
    const BelowAutogradWithoutGraph guard;
    auto [dinput, dweight, dbias] = layer_norm_backward_op().call(
        gradients[0], saved[0], saved[1], saved[2], weight, ctx->saved_data["normalized_dims"].toInt(),
        ctx->saved_data["rms"].toBool(), need.dweight, need.dbias, bias_dtype);
    variable_list results(7);
    results[0] = dinput;
    if (need.dweight) results[1] = dweight;
    if (need.dbias) results[2] = dbias;
    return results;
  }
};

// --- add_layer_norm --------------------------------------------------------------------------------------------------

struct AddLayerNormFunction : torch::autograd::Function<AddLayerNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& rng_state, double dropout_p, int64_t normalized_dims, double eps,
                               bool rms, Outputs4* outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *outputs = add_layer_norm_op().call(input, residual, weight, bias, rng_state, dropout_p, normalized_dims, eps, rms);
    const auto& [out, new_residual, mean, rstd] = *outputs;
    ctx->save_for_backward({new_residual, mean, rstd, weight.value_or(Tensor()), rng_state.value_or(Tensor())});
    ctx->saved_data["emulating"] = emulating();
    ctx->saved_data["rms"] = rms;
    ctx->saved_data["normalized_dims"] = normalized_dims;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["bias_dtype"] = dtype_of(bias);
    ctx->saved_data["input_dtype"] = input.scalar_type();
    ctx->set_materialize_grads(false);
    return {out, new_residual};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const EmulationScope scope(ctx->saved_data["emulating"].toBool());
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& new_residual = saved[0];
    const OptionalTensor weight = if_defined(saved[3]);
    const OptionalDtype bias_dtype = saved_dtype(ctx);
    const at::ScalarType input_dtype = ctx->saved_data["input_dtype"].toScalarType();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const ParamNeeds need(ctx, 2, weight.has_value(), bias_dtype.has_value());
    // Only new_residual was used: rare, and not worth a kernel of its own.
    const Tensor dout =
        gradients[0].defined() ? gradients[0] : at::zeros_like(new_residual, new_residual.options().dtype(input_dtype));
    const BelowAutogradWithoutGraph guard;
    auto [dinput, dresidual, dweight, dbias] = add_layer_norm_backward_op().call(
        dout, if_defined(gradients[1]), new_residual, saved[1], saved[2], weight, if_defined(saved[4]), dropout_p,
        ctx->saved_data["normalized_dims"].toInt(), ctx->saved_data["rms"].toBool(), need.dweight, need.dbias,
        bias_dtype, input_dtype);
    // The op leaves dinput empty where it would equal dresidual.
    const bool same = dropout_p == 0.0 && input_dtype == new_residual.scalar_type();
    variable_list results(10);
    results[0] = same ? dresidual : dinput;
    results[1] = dresidual;
    if (need.dweight) results[2] = dweight;
    if (need.dbias) results[3] = dbias;
    return results;
  }
};

// --- The nodes -------------------------------------------------------------------------------------------------------

}  // namespace
}  // namespace fastattn

#if FASTATTN_SHORTENS_NODES
namespace torch::autograd {

template <>
variable_list CppNode<fastattn::LayerNormFunction>::apply(variable_list&& gradients) {
  const std::lock_guard lock(mutex_);
  return fastattn::apply_backward(*this, std::move(gradients));
}

template <>
variable_list CppNode<fastattn::AddLayerNormFunction>::apply(variable_list&& gradients) {
  const std::lock_guard lock(mutex_);
  return fastattn::apply_backward(*this, std::move(gradients));
}

}  // namespace torch::autograd
#endif

namespace fastattn {
namespace {

Outputs3 layer_norm_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             int64_t normalized_dims, double eps, bool rms) {
  if (!any_requires_grad(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_norm_op().call(input, weight, bias, normalized_dims, eps, rms);
  }
  Outputs3 outputs;
  std::get<0>(outputs) = LayerNormFunction::apply(input, weight, bias, normalized_dims, eps, rms, &outputs)[0];
  return outputs;
}

Outputs4 add_layer_norm_autograd(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& rng_state, double dropout_p,
                                 int64_t normalized_dims, double eps, bool rms) {
  if (!any_requires_grad(input, residual, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return add_layer_norm_op().call(input, residual, weight, bias, rng_state, dropout_p, normalized_dims, eps, rms);
  }
  Outputs4 outputs;
  const variable_list tracked = AddLayerNormFunction::apply(input, residual, weight, bias, rng_state, dropout_p,
                                                            normalized_dims, eps, rms, &outputs);
  std::get<0>(outputs) = tracked[0];
  std::get<1>(outputs) = tracked[1];
  return outputs;
}

// --- Gradients of gradients ------------------------------------------------------------------------------------------

// Runs a backward op where its inputs require grad themselves (create_graph=True); raises where the gradient of its
// outputs is wanted.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext* ctx, at::TensorList, const std::string& op,
                               c10::function_ref<variable_list()> run) {
    ctx->saved_data["op"] = op;
    at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, ctx->saved_data["op"].toStringRef(),
        ": the kernels do not compute gradients of gradients. Use backend='eager', which does.");
  }
};

template <typename... Tensors>
variable_list run_without_double_backward(const char* op, c10::function_ref<variable_list()> run,
                                          const Tensors&... inputs) {
  if (!any_requires_grad(inputs...)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  }
  variable_list tracked;
  for (const OptionalTensor& input : {OptionalTensor(inputs)...}) {
    if (input && input->defined()) tracked.push_back(*input);
  }
  return NoDoubleBackward::apply(at::TensorList(tracked), std::string(op), run);
}

Outputs3 layer_norm_backward_autograd(const Tensor& dout, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                      const OptionalTensor& weight, int64_t normalized_dims, bool rms,
                                      bool need_dweight, bool need_dbias, OptionalDtype bias_dtype) {
  const auto run = [&] {
    auto [dinput, dweight, dbias] = layer_norm_backward_op().call(dout, input, mean, rstd, weight, normalized_dims, rms,
                                                                  need_dweight, need_dbias, bias_dtype);
    return variable_list{dinput, dweight, dbias};
  };
  const variable_list outputs = run_without_double_backward(rms ? "rms_norm" : "layer_norm", run, dout, input, weight);
  return {outputs[0], outputs[1], outputs[2]};
}

Outputs4 add_layer_norm_backward_autograd(const Tensor& dout, const OptionalTensor& dnew_residual,
                                          const Tensor& new_residual, const Tensor& mean, const Tensor& rstd,
                                          const OptionalTensor& weight, const OptionalTensor& rng_state,
                                          double dropout_p, int64_t normalized_dims, bool rms, bool need_dweight,
                                          bool need_dbias, OptionalDtype bias_dtype, at::ScalarType input_dtype) {
  const auto run = [&] {
    auto [dinput, dresidual, dweight, dbias] =
        add_layer_norm_backward_op().call(dout, dnew_residual, new_residual, mean, rstd, weight, rng_state, dropout_p,
                                          normalized_dims, rms, need_dweight, need_dbias, bias_dtype, input_dtype);
    return variable_list{dinput, dresidual, dweight, dbias};
  };
  const char* const op = rms ? "add_rms_norm" : "add_layer_norm";
  const variable_list outputs = run_without_double_backward(op, run, dout, dnew_residual, new_residual, weight);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  m.impl("layer_norm_backward", layer_norm_backward_autograd);
  m.impl("add_layer_norm", add_layer_norm_autograd);
  m.impl("add_layer_norm_backward", add_layer_norm_backward_autograd);
}

}  // namespace fastattn
