// What comes into attention's ops and what goes out, as tensors and as the kernels' parameters.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "attention/attention.h"
#include "attention/attention_glue.h"

namespace fastattn {

// Conversions and copies of the operands; they live as long as the kernel runs.
struct Operands {
  at::Tensor query, key, value, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k;
};

// Scores, statistics and everything accumulated: double for double inputs, else float.
at::ScalarType statistics_dtype(const at::Tensor& query);

// `query` is the op's first tensor, whose device the others share.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& query, at::ScalarType dtype,
                  at::IntArrayRef shape);

// `entries`: what key and value have in place of a batch; of a cache, as many as there are.
void check_qkv(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t entries);
void check_qkv(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value);

// The kernels read rows: the elements of one row must be neighbours. Rows that the CUDA kernels cannot address are
// copied and end in zeros up to a multiple of eight elements.
at::Tensor with_contiguous_rows(const at::Tensor& tensor);

// Memory that a kernel is about to write whole.
at::Tensor empty_output(at::IntArrayRef shape, const at::TensorOptions& options);

// Heads inside rows if `like` has them so: then transpose(1, 2).reshape(batch, seqlen, heads * head_dim) is free.
at::Tensor empty_rows(const at::Tensor& like, int64_t head_dim);

AttentionTensor operand(const at::Tensor& tensor);

// Checks the operands that scores are made of and fills everything but value, out and lse.
Operands fill_scores(AttentionParams& p, const at::Tensor& query, const at::Tensor& key,
                     const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
                     const std::optional<at::Tensor>& rng_state, const Scoring& scoring);

void fill_value_and_sinks(AttentionParams& p, Operands& operands, const at::Tensor& query, const at::Tensor& value,
                          const std::optional<at::Tensor>& sinks);

}  // namespace fastattn
