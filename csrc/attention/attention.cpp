// Torch glue of attention: checks its operands, allocates outputs, fills the parameters and calls the kernels of the
// tensors' device. attention_operands.cpp holds what comes in, attention_autograd.cpp the gradients,
// attention_with_kv_cache.cpp what decoding has beyond attention.
#include "attention/attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "attention/attention_fwd_choice.h"
#include "attention/attention_glue.h"
#include "attention/attention_operands.h"
#include "common/device_launch.h"

namespace fastattn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- Forward and backward, of a dense batch or of packed sequences --------------------------------------------------

namespace {

struct Forward {
  AttentionParams p;
  Operands operands;
  Tensor out, lse;
};

// Checked, allocated, filled in.
Forward prepare_forward(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                        const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                        const OptionalTensor& rng_state, const Scoring& scoring) {
  if (scoring.cache != nullptr) {
    check_qkv(query, key, value, key.size(0));
  } else {
    check_qkv(query, key, value);
  }
  Forward forward;
  AttentionParams& p = forward.p;
  forward.operands = fill_scores(p, query, key, attn_mask, alibi_slopes, rng_state, scoring);
  fill_value_and_sinks(p, forward.operands, query, value, sinks);

  forward.out = empty_rows(query, p.head_dim_v);
  forward.lse = at::empty(query.sizes().slice(0, 3), query.options().dtype(statistics_dtype(query)));
  p.out = operand(forward.out);
  p.lse = forward.lse.data_ptr();
  return forward;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                             const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                             const Scoring& scoring) {
  const Forward forward = prepare_forward(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, scoring);
  const AttentionParams& p = forward.p;
  const Tensor &out = forward.out, &lse = forward.lse;
  if (lse.numel() == 0) return {out, lse};
  if (p.batch == 0 || p.seqlen_q == 0) {
    // No row is in a sequence.
    out.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
  } else if (runs_cuda_kernels(query)) {
    run_on_device("attention", query, attention_fwd_cuda, p, attention_fwd_cuda_workspace_bytes);
  } else {
    FASTATTN_BF16_CPU_DISPATCH(attention_fwd_cpu, p);
  }
  return {out, lse};
}

std::string attention_forward_kernels(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                      const Scoring& scoring) {
  const Forward forward = prepare_forward(query, key, value, std::nullopt, alibi_slopes, sinks, std::nullopt, scoring);
  if (!runs_cuda_kernels(query) || forward.lse.numel() == 0) return "";
  const c10::OptionalDeviceGuard guard(query.device());
  const DeviceLaunch launch = make_launch(query);
  if (launch.compute_capability != 90) return "";
  const char* refusal = attention_fwd_sm90_refusal(forward.p, launch);
  if (refusal == nullptr) return "Hopper's own kernel";
  return std::string("the kernels of compute capability 8.0: ") + refusal;
}

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients run_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key,
                       const Tensor& value, const Tensor& out, const Tensor& lse, const OptionalTensor& attn_mask,
                       const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& rng_state,
                       const Scoring& scoring, bool need_dmask, bool need_dsinks) {
  check_qkv(query, key, value);
  AttentionBwdParams p;
  Operands operands = fill_scores(p, query, key, attn_mask, alibi_slopes, rng_state, scoring);
  fill_value_and_sinks(p, operands, query, value, sinks);

  const at::ScalarType statistics = statistics_dtype(query);
  const int64_t row_shape[] = {query.size(0), p.heads, query.size(2)};
  const int64_t out_shape[] = {query.size(0), p.heads, query.size(2), p.head_dim_v};
  check_tensor("out", out, query, query.scalar_type(), out_shape);
  check_tensor("dout", dout, query, query.scalar_type(), out_shape);
  check_tensor("lse", lse, query, statistics, row_shape);
  const Tensor out_rows = with_contiguous_rows(out), dout_rows = with_contiguous_rows(dout),
               lse_rows = lse.contiguous();
  p.out = operand(out_rows);
  p.dout = operand(dout_rows);
  p.lse = lse_rows.data_ptr();
  Tensor dlse_rows;
  if (dlse.has_value()) {
    check_tensor("dlse", *dlse, query, statistics, row_shape);
    dlse_rows = dlse->contiguous();
    p.dlse = dlse_rows.const_data_ptr();
  }

  const Tensor dq = empty_rows(query, p.head_dim), dk = empty_rows(key, p.head_dim),
               dv = empty_rows(value, p.head_dim_v);
  p.dq = operand(dq);
  p.dk = operand(dk);
  p.dv = operand(dv);
  // The kernel adds up in float; a mask or sinks of another dtype are converted at the end.
  Tensor dmask = at::empty({0}, query.options()), dsinks = at::empty({0}, query.options());
  if (need_dmask) {
    TORCH_CHECK_VALUE(attn_mask.has_value() && attn_mask->is_floating_point(),
                      "attention: need_dmask needs a floating attn_mask.");
    dmask = empty_output(attn_mask->sizes(), query.options().dtype(statistics));
    const Tensor expanded = dmask.expand({p.batch, p.heads, p.seqlen_q, p.seqlen_k});
    p.dmask = dmask.data_ptr();
    p.stride_dmask_batch = expanded.stride(0), p.stride_dmask_head = expanded.stride(1);
    p.stride_dmask_q = expanded.stride(2), p.stride_dmask_k = expanded.stride(3);
  }
  if (need_dsinks) {
    TORCH_CHECK_VALUE(sinks.has_value(), "attention: need_dsinks needs sinks.");
    dsinks = at::empty({p.heads}, query.options().dtype(statistics));
    p.dsinks = dsinks.data_ptr();
  }

  const bool attends = lse.numel() > 0 && p.batch > 0 && p.seqlen_q > 0 && p.seqlen_k > 0;
  if (attends && runs_cuda_kernels(query)) {
    run_on_device("attention", query, attention_bwd_cuda, p, attention_bwd_cuda_workspace_bytes);
  } else if (attends) {
    FASTATTN_BF16_CPU_DISPATCH(attention_bwd_cpu, p);
  } else {
    // Nothing was attended to, except perhaps a sink: then lse is the sink itself, but for rows of no sequence.
    for (const Tensor& gradient : {dq, dk, dv, dmask}) gradient.zero_();
    if (need_dsinks && dlse.has_value()) {
      constexpr int64_t kBatchAndQueries[] = {0, 2};  // a bare {0, 2} is ambiguous to PyTorch 2.11
      dsinks.copy_(at::where(lse.isneginf(), at::zeros_like(*dlse), *dlse).sum(kBatchAndQueries));
    } else if (need_dsinks) {
      dsinks.zero_();
    }
  }
  if (need_dmask) dmask = dmask.to(attn_mask->scalar_type());
  if (need_dsinks) dsinks = dsinks.to(sinks->scalar_type());
  return {dq, dk, dv, dmask, dsinks};
}

// --- The ops --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& rng_state, double dropout_p,
                                     bool is_causal, double scale, int64_t window_left, int64_t window_right,
                                     bool bottom_right, double softcap) {
  return attention_forward(query, key, value, attn_mask, alibi_slopes, sinks, rng_state,
                           {dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap});
}

Gradients attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key,
                             const Tensor& value, const Tensor& out, const Tensor& lse, const OptionalTensor& attn_mask,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                             const OptionalTensor& rng_state, double dropout_p, bool is_causal, double scale,
                             int64_t window_left, int64_t window_right, bool bottom_right, double softcap,
                             bool need_dmask, bool need_dsinks) {
  return run_backward(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state,
                      {dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap}, need_dmask,
                      need_dsinks);
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k,
                                            const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                            const OptionalTensor& rng_state, double dropout_p, bool is_causal,
                                            double scale, int64_t window_left, int64_t window_right, bool bottom_right,
                                            double softcap) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                        /*check_values=*/!emulating() || emulator_checks_values()};
  const auto [out, lse] = attention_forward(
      as_dense_batch(query), as_dense_batch(key), as_dense_batch(value), std::nullopt, alibi_slopes, sinks, rng_state,
      {dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap, &packing});
  return {as_packed(out), lse.squeeze(0)};
}

// The forward has looked at the lengths.
std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double dropout_p, bool is_causal, double scale, int64_t window_left,
    int64_t window_right, bool bottom_right, double softcap, bool need_dsinks) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, /*check_values=*/false};
  const auto [dq, dk, dv, dmask, dsinks] = run_backward(
      as_dense_batch(dout), dlse.has_value() ? OptionalTensor(dlse->unsqueeze(0)) : std::nullopt, as_dense_batch(query),
      as_dense_batch(key), as_dense_batch(value), as_dense_batch(out), lse.unsqueeze(0), std::nullopt, alibi_slopes,
      sinks, rng_state, {dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap, &packing},
      /*need_dmask=*/false, need_dsinks);
  return {as_packed(dq), as_packed(dk), as_packed(dv), dsinks};
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const Tensor& lse, const OptionalTensor& attn_mask,
                         const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state, double dropout_p,
                         bool is_causal, double scale, int64_t window_left, int64_t window_right, bool bottom_right,
                         double softcap, bool average_heads) {
  check_qkv(query, key, key);
  AttentionWeightsParams p;
  const Operands operands =
      fill_scores(p, query, key, attn_mask, alibi_slopes, rng_state,
                  {dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap});
  check_tensor("lse", lse, query, statistics_dtype(query), {p.batch, p.heads, p.seqlen_q});
  const Tensor lse_rows = lse.contiguous();
  p.lse = lse_rows.data_ptr();
  p.average_heads = average_heads;

  const Tensor weights = average_heads ? empty_output({p.batch, p.seqlen_q, p.seqlen_k}, query.options())
                                       : empty_output({p.batch, p.heads, p.seqlen_q, p.seqlen_k}, query.options());
  p.weights = weights.data_ptr();
  if (p.heads == 0) {
    weights.zero_();
  } else if (weights.numel() == 0) {
    return weights;
  } else if (runs_cuda_kernels(query)) {
    run_on_device("attention", query, attention_weights_cuda, p);
  } else {
    FASTATTN_CPU_DISPATCH(attention_weights_cpu, p);
  }
  return weights;
}

void register_ops(torch::Library& m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
  m.impl("varlen_attention", &varlen_attention);
  m.impl("varlen_attention_backward", &varlen_attention_backward);
  m.impl("attention_weights", &attention_weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { register_ops(m); }

}  // namespace fastattn
