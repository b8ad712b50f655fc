// Torch glue of attention that its ops share: attention.cpp has it.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>

#include "attention/attention_packing.h"

namespace fastattn {

struct Scoring {
  double dropout_p;
  bool is_causal;
  double scale;
  int64_t window_left, window_right;
  bool bottom_right;
  double softcap;
  const Packing* packing = nullptr;
  const KvCache* cache = nullptr;
};

// (out, lse) of checked operands (batch, heads, seqlen, head_dim). With scoring.cache, key and value are the cache,
// (entries, heads_kv, block_size, head_dim).
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& attn_mask,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& rng_state, const Scoring& scoring);

// Which kernels attention_forward would start, as a sentence's end. Empty where nothing is to be said: where none would
// run, and on cards with one family of them.
std::string attention_forward_kernels(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      const std::optional<at::Tensor>& alibi_slopes,
                                      const std::optional<at::Tensor>& sinks, const Scoring& scoring);

}  // namespace fastattn
