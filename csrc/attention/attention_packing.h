// Torch glue of packed sequences: what varlen_attention has beyond attention. Its operands (total, heads, head_dim)
// become (1, heads, total, head_dim) views, with which the glue of attention does the rest.
#pragma once

#include <ATen/ATen.h>

#include "attention/attention.h"

namespace fastattn {

struct Packing {
  at::Tensor cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  bool check_values;
};

inline at::Tensor as_dense_batch(const at::Tensor& packed) {
  TORCH_CHECK_VALUE(packed.dim() == 3,
                    "varlen_attention: query, key, value and what has their shapes must have 3 dims ",
                    "(total, heads, head_dim), got ", packed.sizes(), ".");
  return packed.transpose(0, 1).unsqueeze(0);
}
inline at::Tensor as_packed(const at::Tensor& dense) { return dense.squeeze(0).transpose(0, 1); }

// cu_seqlens of the sequences in `rows` rows as the kernels read it: int32, contiguous. On the CPU, raises for values
// that do not fit if check_values; kernels stay inside the tensors whatever the values are.
at::Tensor checked_cu_seqlens(const char* name, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                              const at::Tensor& rows, bool check_values);

}  // namespace fastattn
