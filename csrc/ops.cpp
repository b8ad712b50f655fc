// Every op of fastattn, on one page. The public Python functions in fastattn/ops check what arguments mean and choose a
// backend; these ops take checked arguments, and their implementations (<op>/<op>.cpp) check what memory safety needs.
// "Autograd" and the device implementations are registered in <op>/<op>.cpp, fake kernels in
// fastattn/ops/<op>_compiled.py.
#include <torch/library.h>

TORCH_LIBRARY(fastattn, m) {
  // --- attention ---
  // query (batch, heads, seqlen_q, head_dim), key (batch, heads_kv, seqlen_k, head_dim), value (batch, heads_kv,
  // seqlen_k, head_dim_v); any strides, last dim contiguous. attn_mask broadcastable to (batch, heads, seqlen_q,
  // seqlen_k), bool (true = attend) or floating; alibi_slopes (heads,) or (batch, heads) fp32; sinks (heads,).
  // rng_state (2,) int64 = (seed, offset), given iff dropout_p > 0. window_left, window_right: -1 = unlimited.
  // Returns out (batch, heads, seqlen_q, head_dim_v) and lse (batch, heads, seqlen_q), fp32 (fp64 for fp64 inputs).
  // lse is contiguous. out takes the layout of query: if query.stride(1) < query.stride(2), it is the transpose(1, 2)
  // of a contiguous (batch, seqlen_q, heads, head_dim_v), else contiguous. dq, dk, dv follow query, key, value in the
  // same way.
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? rng_state, float dropout_p, bool is_causal, float scale, SymInt window_left, SymInt window_right, "
      "bool bottom_right, float softcap) -> (Tensor out, Tensor lse)");
  // dlse may be absent (= 0). dmask has the shape and dtype of attn_mask, dsinks those of sinks, both contiguous; they
  // have shape (0,) unless need_dmask, need_dsinks. Itself not differentiable: its backward raises NotImplementedError.
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, float dropout_p, bool is_causal, "
      "float scale, SymInt window_left, SymInt window_right, bool bottom_right, float softcap, bool need_dmask, "
      "bool need_dsinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)");
  // attention within each of several packed sequences: query (total_q, heads, head_dim), key (total_k, heads_kv,
  // head_dim), value (total_k, heads_kv, head_dim_v). cu_seqlens_q, cu_seqlens_k (batch + 1,) int32 or int64: sequence
  // b is rows [cu_seqlens[b], cu_seqlens[b + 1]), no more than max_seqlen; on the CPU their values are checked.
  // bottom_right is meant within a sequence. Returns out (total_q, heads, head_dim_v), contiguous unless query's rows
  // lie inside its heads, and lse (heads, total_q); rows of no sequence have out 0 and lse -inf.
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, "
      "float dropout_p, bool is_causal, float scale, SymInt window_left, SymInt window_right, bool bottom_right, "
      "float softcap) -> (Tensor out, Tensor lse)");
  // As attention_backward; rows of no sequence have gradients of 0.
  m.def(
      "varlen_attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, float dropout_p, bool is_causal, float scale, "
      "SymInt window_left, SymInt window_right, bool bottom_right, float softcap, bool need_dsinks) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  // A step of decoding, on the CPU and the CUDA kernels: appends key and value to the caches and rotates them and
  // query, all (batch, seqlen, heads, head_dim), then attends to the first cache_seqlens + seqlen_new tokens,
  // bottom-right. cache_seqlens (batch,) and block_table (batch, blocks_per_sequence) are int32 or int64; cache_seqlen
  // counts where cache_seqlens is absent. Returns out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads,
  // seqlen_q).
  m.def(
      "attention_with_kv_cache(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? key, Tensor? value, "
      "Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, "
      "bool rotary_interleaved, Tensor? alibi_slopes, Tensor? sinks, bool is_causal, float scale, SymInt window_left, "
      "SymInt window_right, float softcap) -> (Tensor out, Tensor lse)");
  // Which of the CUDA kernels that call would run, for explain(); empty where there is one family of them.
  m.def(
      "attention_with_kv_cache_kernels(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? key, Tensor? value, "
      "Tensor? cache_seqlens, int cache_seqlen, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, "
      "bool rotary_interleaved, Tensor? alibi_slopes, Tensor? sinks, bool is_causal, float scale, int window_left, "
      "int window_right, float softcap) -> str");
  // exp(score - lse) after dropout: (batch, heads, seqlen_q, seqlen_k), or its mean over heads (batch, seqlen_q,
  // seqlen_k).
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, Tensor? alibi_slopes, "
      "Tensor? rng_state, float dropout_p, bool is_causal, float scale, SymInt window_left, SymInt window_right, "
      "bool bottom_right, float softcap, bool average_heads) -> Tensor");

  // --- layer_norm ---
  // Normalises the last normalized_dims dims of input together, a row of them at a time; rows at any stride, their
  // elements contiguous. weight and bias have the shape of a row. rms = no mean, no bias. mean (absent for rms: no
  // elements) and rstd have the leading dims, fp32 (fp64 for fp64 inputs).
  m.def(
      "layer_norm(Tensor input, Tensor? weight, Tensor? bias, int normalized_dims, float eps, bool rms) -> "
      "(Tensor out, Tensor mean, Tensor rstd)");
  // dweight and dbias have no elements where they are not needed.
  m.def(
      "layer_norm_backward(Tensor dout, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int normalized_dims, "
      "bool rms, bool need_dweight, bool need_dbias, ScalarType? bias_dtype) -> "
      "(Tensor dinput, Tensor dweight, Tensor dbias)");
  // new_residual = residual + dropout(input), in residual's dtype; out = norm(new_residual), in input's.
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? rng_state, float dropout_p, "
      "int normalized_dims, float eps, bool rms) -> (Tensor out, Tensor new_residual, Tensor mean, Tensor rstd)");
  // dinput has no elements where it equals dresidual: without dropout, if the dtypes are the same.
  m.def(
      "add_layer_norm_backward(Tensor dout, Tensor? dnew_residual, Tensor new_residual, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? rng_state, float dropout_p, int normalized_dims, bool rms, bool need_dweight, "
      "bool need_dbias, ScalarType? bias_dtype, ScalarType input_dtype) -> "
      "(Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias)");

  // --- linear ---
  // activation(input @ weight^T + bias) of input (..., K), weight (N, K), bias (N,), all of one dtype; made for few
  // rows on the CPU, where reading the weight takes all the time. Has no backward.
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");

  // --- int8_matmul ---
  // (..., K) -> q (..., K) int8 and scale (...) fp32; input ~ q * scale.
  m.def("quantize_int8(Tensor input) -> (Tensor q, Tensor scale)");
  // a (M, K) int8, b (N, K) int8, a_scale (M,), b_scale (N,), bias (N,): act((a @ b.T) * a_scale[:, None] * b_scale +
  // bias).
  m.def(
      "int8_matmul(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str activation, "
      "ScalarType out_dtype) -> Tensor");
  // weight (N, K) int8, weight_scale (N,); input (..., K) floating, quantised per row inside. Result in input's dtype.
  m.def("int8_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias, str activation) -> Tensor");
  // The layout that the CPU's matrix loop reads: made once for a weight that is used again.
  m.def("int8_pack_weight(Tensor weight) -> Tensor");
  m.def(
      "int8_linear_packed(Tensor input, Tensor packed_weight, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "str activation) -> Tensor");
}
