// Gradients of the attention ops, for every backend: the Functions below only call ops, which the dispatcher routes by
// device.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common/device_launch.h"

namespace fastattn {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What shapes the scores besides tensors, in the order of the schemas.
struct Scoring {
  double dropout_p;
  bool is_causal;
  double scale;
  SymInt window_left, window_right;
  bool bottom_right;
  double softcap;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window_left"] = window_left;
    ctx->saved_data["window_right"] = window_right;
    ctx->saved_data["bottom_right"] = bottom_right;
    ctx->saved_data["softcap"] = softcap;
    ctx->saved_data["emulating"] = emulating();
  }
  static Scoring load(AutogradContext* ctx) {
    return {ctx->saved_data["dropout_p"].toDouble(),    ctx->saved_data["is_causal"].toBool(),
            ctx->saved_data["scale"].toDouble(),        ctx->saved_data["window_left"].toSymInt(),
            ctx->saved_data["window_right"].toSymInt(), ctx->saved_data["bottom_right"].toBool(),
            ctx->saved_data["softcap"].toDouble()};
  }
};

// What packed sequences add; absent for a dense batch. Both are differentiated by the same functions.
struct Packing {
  Tensor cu_seqlens_q, cu_seqlens_k;
  SymInt max_seqlen_q = 0, max_seqlen_k = 0;

  bool is_present() const { return cu_seqlens_q.defined(); }
};

// --- The ops, through the dispatcher ---------------------------------------------------------------------------------

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> call_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                          const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                          const Packing& packing, const Scoring& s) {
  if (packing.is_present()) {
    using Signature =
        std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, SymInt,
                                   SymInt, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                                   bool, double, SymInt, SymInt, bool, double);
    static const auto op = find_op<Signature>("fastattn::varlen_attention");
    return op.call(query, key, value, packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_seqlen_q,
                   packing.max_seqlen_k, alibi_slopes, sinks, rng_state, s.dropout_p, s.is_causal, s.scale,
                   s.window_left, s.window_right, s.bottom_right, s.softcap);
  }
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                               double, bool, double, SymInt, SymInt, bool, double);
  static const auto op = find_op<Signature>("fastattn::attention");
  return op.call(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, s.dropout_p, s.is_causal, s.scale,
                 s.window_left, s.window_right, s.bottom_right, s.softcap);
}

// dq, dk, dv, dmask, dsinks
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients call_attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query,
                                  const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                  const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                  const OptionalTensor& sinks, const OptionalTensor& rng_state, const Packing& packing,
                                  const Scoring& s, bool need_dmask, bool need_dsinks) {
  if (packing.is_present()) {
    using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const Tensor&, SymInt, SymInt, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&, double, bool, double, SymInt, SymInt, bool, double, bool);
    static const auto op = find_op<Signature>("fastattn::varlen_attention_backward");
    auto [dq, dk, dv, dsinks] =
        op.call(dout, dlse, query, key, value, out, lse, packing.cu_seqlens_q, packing.cu_seqlens_k,
                packing.max_seqlen_q, packing.max_seqlen_k, alibi_slopes, sinks, rng_state, s.dropout_p, s.is_causal,
                s.scale, s.window_left, s.window_right, s.bottom_right, s.softcap, need_dsinks);
    return {dq, dk, dv, Tensor(), dsinks};
  }
  using Signature =
      Gradients(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, double, bool, double, SymInt, SymInt, bool, double, bool, bool);
  static const auto op = find_op<Signature>("fastattn::attention_backward");
  return op.call(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state, s.dropout_p,
                 s.is_causal, s.scale, s.window_left, s.window_right, s.bottom_right, s.softcap, need_dmask,
                 need_dsinks);
}

Tensor call_attention_weights(const Tensor& query, const Tensor& key, const Tensor& lse,
                              const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                              const OptionalTensor& rng_state, const Scoring& s, bool average_heads) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, double, bool, double, SymInt, SymInt, bool, double, bool);
  static const auto op = find_op<Signature>("fastattn::attention_weights");
  return op.call(query, key, lse, attn_mask, alibi_slopes, rng_state, s.dropout_p, s.is_causal, s.scale, s.window_left,
                 s.window_right, s.bottom_right, s.softcap, average_heads);
}

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
OptionalTensor or_absent(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// False = nothing will ask for a gradient (nor a tangent, which Function refuses with a clear error): skip the
// bookkeeping.
bool differentiates(std::initializer_list<const Tensor*> inputs) {
  for (const Tensor* input : inputs) {
    if (!input->defined()) continue;
    if (at::GradMode::is_enabled() && input->requires_grad()) return true;
    if (input->_fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

bool is_floating_and_requires_grad(const Tensor& tensor) {
  return tensor.defined() && tensor.is_floating_point() && tensor.requires_grad();
}

// --- attention -------------------------------------------------------------------------------------------------------

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& sinks, const OptionalTensor& rng_state, const Packing& packing,
                               const Scoring& scoring) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, lse] = call_attention(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, packing, scoring);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, or_undefined(attn_mask), or_undefined(alibi_slopes), or_undefined(sinks),
                            or_undefined(rng_state), out, lse, packing.cu_seqlens_q, packing.cu_seqlens_k});
    ctx->saved_data["max_seqlen_q"] = packing.max_seqlen_q;
    ctx->saved_data["max_seqlen_k"] = packing.max_seqlen_k;
    scoring.save(ctx);
    ctx->saved_data["need_dmask"] = is_floating_and_requires_grad(or_undefined(attn_mask));
    ctx->saved_data["need_dsinks"] = is_floating_and_requires_grad(or_undefined(sinks));
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const EmulationScope scope(ctx->saved_data["emulating"].toBool());
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &out = saved[7], &dlse = gradients[1];
    // query, key, value, attn_mask, alibi_slopes, sinks, rng_state, packing, scoring
    variable_list inputs(9);
    if (!gradients[0].defined() && !dlse.defined()) return inputs;
    const Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(out);

    const Packing packing{saved[9], saved[10], ctx->saved_data["max_seqlen_q"].toSymInt(),
                          ctx->saved_data["max_seqlen_k"].toSymInt()};
    const bool need_dmask = ctx->saved_data["need_dmask"].toBool();
    const bool need_dsinks = ctx->saved_data["need_dsinks"].toBool();
    auto [dq, dk, dv, dmask, dsinks] = call_attention_backward(
        dout, or_absent(dlse), saved[0], saved[1], saved[2], out, saved[8], or_absent(saved[3]), or_absent(saved[4]),
        or_absent(saved[5]), or_absent(saved[6]), packing, Scoring::load(ctx), need_dmask, need_dsinks);
    inputs[0] = dq;
    inputs[1] = dk;
    inputs[2] = dv;
    if (need_dmask) inputs[3] = dmask;
    if (need_dsinks) inputs[5] = dsinks;
    return inputs;
  }
};

std::tuple<Tensor, Tensor> differentiable_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                                    const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                                    const Packing& packing, const Scoring& scoring) {
  const Tensor mask = or_undefined(attn_mask), sink_logits = or_undefined(sinks);
  if (!differentiates({&query, &key, &value, &mask, &sink_logits})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_attention(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, packing, scoring);
  }
  variable_list outputs =
      AttentionFunction::apply(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, packing, scoring);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                              const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                              double dropout_p, bool is_causal, double scale, SymInt window_left,
                                              SymInt window_right, bool bottom_right, double softcap) {
  return differentiable_attention(
      query, key, value, attn_mask, alibi_slopes, sinks, rng_state, Packing{},
      {dropout_p, is_causal, scale, std::move(window_left), std::move(window_right), bottom_right, softcap});
}

std::tuple<Tensor, Tensor> varlen_attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                     SymInt max_seqlen_q, SymInt max_seqlen_k,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     const OptionalTensor& rng_state, double dropout_p, bool is_causal,
                                                     double scale, SymInt window_left, SymInt window_right,
                                                     bool bottom_right, double softcap) {
  return differentiable_attention(
      query, key, value, std::nullopt, alibi_slopes, sinks, rng_state,
      {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k)},
      {dropout_p, is_causal, scale, std::move(window_left), std::move(window_right), bottom_right, softcap});
}

// --- attention_backward: computes, but says so clearly if its own gradient is wanted ---------------------------------

struct AttentionBackwardFunction : torch::autograd::Function<AttentionBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dout, const OptionalTensor& dlse,
                               const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                               const Tensor& lse, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& sinks, const OptionalTensor& rng_state, const Packing& packing,
                               const Scoring& scoring, bool need_dmask, bool need_dsinks) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [dq, dk, dv, dmask, dsinks] =
        call_attention_backward(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state,
                                packing, scoring, need_dmask, need_dsinks);
    ctx->set_materialize_grads(false);
    ctx->saved_data["op"] = packing.is_present() ? "varlen_attention" : "attention";
    // Packed sequences have no mask, but every output of a Function has to be a tensor.
    if (!dmask.defined()) dmask = at::empty({0}, dq.options());
    return {dq, dk, dv, dmask, dsinks};
  }

  static variable_list backward(AutogradContext* ctx, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data["op"].toStringRef(),
                                ": the backward of a fastattn kernel cannot be differentiated again. Use "
                                "backend='eager' for second derivatives.");
  }
};

Gradients once_differentiable_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query,
                                       const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                       const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                       const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                       const Packing& packing, const Scoring& scoring, bool need_dmask,
                                       bool need_dsinks) {
  const Tensor mask = or_undefined(attn_mask), sink_logits = or_undefined(sinks), lse_gradient = or_undefined(dlse);
  if (!differentiates({&dout, &lse_gradient, &query, &key, &value, &out, &lse, &mask, &sink_logits})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_attention_backward(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state,
                                   packing, scoring, need_dmask, need_dsinks);
  }
  variable_list outputs =
      AttentionBackwardFunction::apply(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks,
                                       rng_state, packing, scoring, need_dmask, need_dsinks);
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

Gradients attention_backward_autograd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                      const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                      const OptionalTensor& sinks, const OptionalTensor& rng_state, double dropout_p,
                                      bool is_causal, double scale, SymInt window_left, SymInt window_right,
                                      bool bottom_right, double softcap, bool need_dmask, bool need_dsinks) {
  return once_differentiable_backward(
      dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state, Packing{},
      {dropout_p, is_causal, scale, std::move(window_left), std::move(window_right), bottom_right, softcap}, need_dmask,
      need_dsinks);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward_autograd(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, SymInt max_seqlen_q,
    SymInt max_seqlen_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double dropout_p, bool is_causal, double scale, SymInt window_left,
    SymInt window_right, bool bottom_right, double softcap, bool need_dsinks) {
  auto [dq, dk, dv, dmask, dsinks] = once_differentiable_backward(
      dout, dlse, query, key, value, out, lse, std::nullopt, alibi_slopes, sinks, rng_state,
      {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k)},
      {dropout_p, is_causal, scale, std::move(window_left), std::move(window_right), bottom_right, softcap},
      /*need_dmask=*/false, need_dsinks);
  return {dq, dk, dv, dsinks};
}

// --- attention_weights -----------------------------------------------------------------------------------------------
// W = exp(s - lse) * kept / (1 - p), so dW/ds = W, dW/dlse = -W: whoever puts weights into a loss pays for W once more,
// and for two plain matrix products; the softmax's own derivative runs through lse.

struct AttentionWeightsFunction : torch::autograd::Function<AttentionWeightsFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& lse,
                        const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                        const OptionalTensor& rng_state, const Scoring& scoring, bool average_heads) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward(
        {query, key, lse, or_undefined(attn_mask), or_undefined(alibi_slopes), or_undefined(rng_state)});
    scoring.save(ctx);
    ctx->saved_data["average_heads"] = average_heads;
    ctx->saved_data["need_dmask"] = is_floating_and_requires_grad(or_undefined(attn_mask));
    return call_attention_weights(query, key, lse, attn_mask, alibi_slopes, rng_state, scoring, average_heads);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const EmulationScope scope(ctx->saved_data["emulating"].toBool());
    const variable_list saved = ctx->get_saved_variables();
    const Scoring scoring = Scoring::load(ctx);
    const Tensor &query = saved[0], &key = saved[1], &lse = saved[2], &mask = saved[3];
    const at::ScalarType statistics = lse.scalar_type();

    Tensor dweights = gradients[0].to(statistics);
    if (ctx->saved_data["average_heads"].toBool()) dweights = dweights.unsqueeze(1) / query.sym_size(1);
    const Tensor weights = call_attention_weights(query, key, lse, or_absent(mask), or_absent(saved[4]),
                                                  or_absent(saved[5]), scoring, /*average_heads=*/false);
    const Tensor dscores = weights.to(statistics) * dweights;

    // Query heads (kv, group) share key head kv.
    const SymInt batch = query.sym_size(0), heads_kv = key.sym_size(1), rows = query.sym_size(2);
    const SymInt group = heads_kv > 0 ? query.sym_size(1) / heads_kv : SymInt(1);
    const Tensor q = query.to(statistics).reshape_symint({batch, heads_kv, group, rows, query.sym_size(3)});
    const Tensor k = key.to(statistics).unsqueeze(2);
    Tensor draw = dscores.reshape_symint({batch, heads_kv, group, rows, key.sym_size(2)});
    if (scoring.softcap > 0.0) {
      const Tensor tanh = at::tanh(q.matmul(k.transpose(-1, -2)) * (scoring.scale / scoring.softcap));
      draw = draw * (1.0 - tanh * tanh);
    }
    draw = draw * scoring.scale;

    // query, key, lse, attn_mask, alibi_slopes, rng_state, scoring, average_heads
    variable_list inputs(8);
    inputs[0] = draw.matmul(k).reshape_symint(query.sym_sizes()).to(query.scalar_type());
    inputs[1] = draw.transpose(-1, -2).matmul(q).sum(2).to(key.scalar_type());
    inputs[2] = -dscores.sum(-1);
    if (ctx->saved_data["need_dmask"].toBool()) {
      inputs[3] = at::sum_to(dscores, mask.sym_sizes()).to(mask.scalar_type());
    }
    return inputs;
  }
};

Tensor attention_weights_autograd(const Tensor& query, const Tensor& key, const Tensor& lse,
                                  const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                  const OptionalTensor& rng_state, double dropout_p, bool is_causal, double scale,
                                  SymInt window_left, SymInt window_right, bool bottom_right, double softcap,
                                  bool average_heads) {
  const Scoring scoring{dropout_p,    is_causal, scale, std::move(window_left), std::move(window_right),
                        bottom_right, softcap};
  const Tensor mask = or_undefined(attn_mask);
  if (!differentiates({&query, &key, &lse, &mask})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_attention_weights(query, key, lse, attn_mask, alibi_slopes, rng_state, scoring, average_heads);
  }
  return AttentionWeightsFunction::apply(query, key, lse, attn_mask, alibi_slopes, rng_state, scoring, average_heads);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, Autograd, m) {
  m.impl("attention", &attention_autograd);
  m.impl("attention_backward", &attention_backward_autograd);
  m.impl("varlen_attention", &varlen_attention_autograd);
  m.impl("varlen_attention_backward", &varlen_attention_backward_autograd);
  m.impl("attention_weights", &attention_weights_autograd);
}

}  // namespace fastattn
