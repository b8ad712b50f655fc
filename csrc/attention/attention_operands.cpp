// The operands of attention: what memory safety needs is checked, what the kernels cannot address is copied.
#include "attention/attention_operands.h"

#include <algorithm>
#include <vector>

#include "attention/kv_cache.h"
#include "common/check.h"
#include "common/device_launch.h"
#include "common/memory.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `query` is the op's first tensor, whose device the others share.
void check_dense(const char* name, const Tensor& tensor, const Tensor& query) {
  TORCH_CHECK_VALUE(tensor.device() == query.device() && tensor.layout() == at::kStrided, "attention: ", name,
                    " must be a dense tensor on ", query.device(), ", as query is; got ", tensor.layout(), " on ",
                    tensor.device(), ".");
}

// No block of the CUDA kernels is for fewer rows or keys of one head.
constexpr int64_t kFewestRows = 16;
int64_t row_tiles(int64_t heads, int64_t seqlen) { return heads * ((seqlen + kFewestRows - 1) / kFewestRows); }

// A grid has fewer than 2^31 blocks. Asked before anything is allocated or copied: an expanded query of any size takes
// no memory.
void check_grid(const Tensor& query, const Tensor& key) {
  const auto blocks = [](const Tensor& tensor) { return tensor.size(0) * row_tiles(tensor.size(1), tensor.size(2)); };
  TORCH_CHECK_NOT_IMPLEMENTED(std::max(blocks(query), blocks(key)) <= kMaxGridBlocks,
                              "attention: the CUDA kernels take up to 2^31 - 1 tiles of ", kFewestRows,
                              " rows (batch * heads * seqlen / ", kFewestRows, "), got query ", query.sizes(), ", key ",
                              key.sizes(), ". Split the batch.");
  TORCH_CHECK_NOT_IMPLEMENTED(query.size(2) <= kMaxCudaSeqlen && key.size(2) <= kMaxCudaSeqlen,
                              "attention: the CUDA kernels take seqlens up to 2^28, got ", query.size(2), " and ",
                              key.size(2), ".");
}

// Rows of the CUDA kernels are copied 16 bytes at a time.
bool has_aligned_rows(const Tensor& tensor) {
  constexpr int64_t kAlignedElems = 8;
  bool aligned = tensor.size(-1) % kAlignedElems == 0 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    aligned = aligned && (tensor.size(dim) <= 1 || tensor.stride(dim) % kAlignedElems == 0);
  }
  return aligned;
}

// A mask in a dtype that the kernels read, expanded to (batch, heads, seqlen_q, seqlen_k) with strides of 0. A
// dimension that the caller expanded is narrowed before the conversion, so that no broadcast mask is ever written out
// in full.
Tensor expanded_mask(const Tensor& mask, const Tensor& query, at::IntArrayRef scores_shape) {
  check_dense("attn_mask", mask, query);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.is_floating_point(),
                   "attention: attn_mask must be bool (True = attend) or floating (added), got ", mask.scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(mask.dim() <= 4, "attention: attn_mask must have at most 4 dims, got ", mask.sizes(), ".");
  Tensor narrowed = mask;
  for (int64_t dim = 0; dim < mask.dim(); ++dim) {
    const int64_t expected = scores_shape[4 - mask.dim() + dim];
    TORCH_CHECK_VALUE(mask.size(dim) == expected || mask.size(dim) == 1, "attention: attn_mask ", mask.sizes(),
                      " does not broadcast to (batch, heads, seqlen_q, seqlen_k) = ", scores_shape, ".");
    if (mask.stride(dim) == 0 && mask.size(dim) > 1) narrowed = narrowed.narrow(dim, 0, 1);
  }
  const at::ScalarType dtype = mask.scalar_type();
  if (dtype != at::kBool && query.scalar_type() == at::kDouble) {
    narrowed = narrowed.to(at::kDouble);
  } else if (dtype != at::kBool && dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    narrowed = narrowed.to(at::kFloat);
  }
  return narrowed.expand(scores_shape);
}

// Lengths and rows become those of the sequences.
void fill_packing(AttentionParams& p, Operands& operands, const Tensor& query, const Tensor& key,
                  const Packing& packing, bool bottom_right) {
  operands.cu_seqlens_q =
      checked_cu_seqlens("cu_seqlens_q", packing.cu_seqlens_q, packing.max_seqlen_q, query, packing.check_values);
  operands.cu_seqlens_k =
      checked_cu_seqlens("cu_seqlens_k", packing.cu_seqlens_k, packing.max_seqlen_k, key, packing.check_values);
  p.packed_q = {operands.cu_seqlens_q.const_data_ptr<int32_t>(), query.size(2)};
  p.packed_k = {operands.cu_seqlens_k.const_data_ptr<int32_t>(), key.size(2)};
  p.packed_bottom_right = bottom_right;
  p.batch = operands.cu_seqlens_q.size(0) - 1;
  TORCH_CHECK_VALUE(operands.cu_seqlens_k.size(0) == p.batch + 1, "varlen_attention: cu_seqlens_q has ", p.batch + 1,
                    " entries but cu_seqlens_k has ", operands.cu_seqlens_k.size(0), ".");
  // Nothing is planned for longer sequences than fit.
  p.seqlen_q = std::min(packing.max_seqlen_q, query.size(2));
  p.seqlen_k = std::min(packing.max_seqlen_k, key.size(2));
  if (runs_cuda_kernels(query)) {
    const int64_t blocks = p.batch * std::max(row_tiles(p.heads, p.seqlen_q), row_tiles(p.heads_kv, p.seqlen_k));
    TORCH_CHECK_NOT_IMPLEMENTED(std::max(blocks, p.batch) < kMaxGridBlocks - 64,
                                "varlen_attention: the CUDA kernels take up to 2^31 - 1 tiles of ", kFewestRows,
                                " rows (sequences * heads * max_seqlen / ", kFewestRows, "), got ", p.batch,
                                " sequences of up to ", p.seqlen_q, " queries and ", p.seqlen_k,
                                " keys. Split the batch.");
  }
}

// Keys of the sequence that has most of them; on a device, where lengths are not read, of one that fills the cache.
int64_t longest_cached(const AttentionParams& p, const Tensor& query) {
  const KvCache& cache = p.cache;
  if (cache.lengths != nullptr && runs_cuda_kernels(query)) return cache.capacity;
  int64_t longest = 0;
  for (int64_t batch = 0; batch < (cache.lengths != nullptr ? p.batch : 1); ++batch) {
    longest = std::max<int64_t>(longest, tokens_before(cache, batch));
  }
  return longest + cache.appended;
}

}  // namespace

at::ScalarType statistics_dtype(const Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& query, at::ScalarType dtype,
                  at::IntArrayRef shape) {
  check_dense(name, tensor, query);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "attention: ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "attention: ", name, " must be ", shape, ", got ", tensor.sizes(), ".");
}

void check_qkv(const Tensor& query, const Tensor& key, const Tensor& value, int64_t entries) {
  kernel_dtype("attention", query.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "attention: query, key and value must have 4 dims (batch, heads, seqlen, head_dim), got ",
                    query.sizes(), ", ", key.sizes(), ", ", value.sizes(), ".");
  check_dense("query", query, query);
  const int64_t heads_kv = key.size(1), head_dim = query.size(3), head_dim_v = value.size(3);
  check_tensor("key", key, query, query.scalar_type(), {entries, heads_kv, key.size(2), head_dim});
  check_tensor("value", value, query, query.scalar_type(), {entries, heads_kv, key.size(2), head_dim_v});
  TORCH_CHECK_VALUE(heads_kv > 0 ? query.size(1) % heads_kv == 0 : query.size(1) == 0,
                    "attention: the heads of query (", query.size(1), ") must be a multiple of those of key (",
                    heads_kv, ").");
  TORCH_CHECK_NOT_IMPLEMENTED(head_dim >= 1 && head_dim <= 256 && head_dim_v >= 1 && head_dim_v <= 256,
                              "attention: the kernels take head_dim 1 to 256, got ", head_dim, " and ", head_dim_v,
                              " (value). Use backend='eager'.");
  const bool is_half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  TORCH_CHECK_NOT_IMPLEMENTED(is_half || !runs_cuda_kernels(query),
                              "attention: the CUDA kernels take float16 and bfloat16, got ", query.scalar_type(),
                              ". Use backend='auto'.");
  if (runs_cuda_kernels(query)) check_grid(query, key);
}

void check_qkv(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_qkv(query, key, value, query.dim() == 4 ? query.size(0) : 0);
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  const bool contiguous = tensor.stride(-1) == 1 || tensor.size(-1) <= 1;
  if (!runs_cuda_kernels(tensor)) return contiguous ? tensor : tensor.contiguous();
  if (contiguous && has_aligned_rows(tensor)) return tensor;
  const int64_t head_dim = tensor.size(-1), padding = (8 - head_dim % 8) % 8;
  // A clone, since contiguous() would return a misaligned tensor that is contiguous already.
  if (padding == 0) return tensor.clone(at::MemoryFormat::Contiguous);
  // Not constant_pad_nd: of heads that lie innermost in memory, it keeps them there.
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape.back() += padding;
  const Tensor rows = at::empty(shape, tensor.options());
  rows.narrow(-1, 0, head_dim).copy_(tensor);
  rows.narrow(-1, head_dim, padding).zero_();
  return rows;
}

Tensor empty_output(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor output = at::empty(shape, options);
  if (output.is_cpu()) advise_huge_pages(output.data_ptr(), static_cast<int64_t>(output.nbytes()));
  return output;
}

Tensor empty_rows(const Tensor& like, int64_t head_dim) {
  const int64_t batch = like.size(0), heads = like.size(1), seqlen = like.size(2);
  if (like.stride(1) < like.stride(2)) {
    return empty_output({batch, seqlen, heads, head_dim}, like.options()).transpose(1, 2);
  }
  return empty_output({batch, heads, seqlen, head_dim}, like.options());
}

AttentionTensor operand(const Tensor& tensor) {
  // Packed sequences share a batch of one, from which no stride leads to the next.
  AttentionTensor rows{tensor.data_ptr(), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1),
                       tensor.stride(2)};
  if (!runs_cuda_kernels(tensor)) return rows;
  // The stride of a dimension of one element may be any number. But tiles step past the last row to rows that they do
  // not read, at addresses that have to be aligned even so.
  if (tensor.size(1) == 1) rows.stride_head = 0;
  if (tensor.size(2) == 1) rows.stride_row = 0;
  return rows;
}

Operands fill_scores(AttentionParams& p, const Tensor& query, const Tensor& key, const OptionalTensor& attn_mask,
                     const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state, const Scoring& scoring) {
  p.dtype = kernel_dtype("attention", query.scalar_type());
  p.batch = query.size(0), p.heads = query.size(1), p.heads_kv = key.size(1);
  p.seqlen_q = query.size(2), p.seqlen_k = key.size(2), p.head_dim = query.size(3);

  Operands operands;
  operands.query = with_contiguous_rows(query);
  operands.key = scoring.cache != nullptr ? key : with_contiguous_rows(key);
  p.q = operand(operands.query);
  p.k = operand(operands.key);
  if (scoring.packing != nullptr) fill_packing(p, operands, query, key, *scoring.packing, scoring.bottom_right);
  if (scoring.cache != nullptr) {
    p.cache = *scoring.cache;
    p.seqlen_k = longest_cached(p, query);
  }

  p.scale = scoring.scale;
  p.softcap = scoring.softcap;
  p.diagonal = scoring.bottom_right ? p.seqlen_k - p.seqlen_q : 0;
  p.window_left = scoring.window_left < 0 ? kUnlimited : std::min(scoring.window_left, kUnlimited);
  p.window_right = scoring.window_right < 0 ? kUnlimited : std::min(scoring.window_right, kUnlimited);
  if (scoring.is_causal) p.window_right = std::min<int64_t>(p.window_right, 0);

  if (attn_mask.has_value()) {
    operands.mask = expanded_mask(*attn_mask, query, {p.batch, p.heads, p.seqlen_q, p.seqlen_k});
    const Tensor& mask = operands.mask;
    // An empty mask has no storage; the kernel must still know that there is one.
    static const char no_elements = 0;
    p.mask = {mask.numel() > 0 ? mask.data_ptr() : &no_elements,
              mask.scalar_type() == at::kBool ? DType::kBool : kernel_dtype("attention", mask.scalar_type()),
              mask.stride(0),
              mask.stride(1),
              mask.stride(2),
              mask.stride(3)};
  }
  if (alibi_slopes.has_value()) {
    const bool per_batch = alibi_slopes->dim() == 2;
    check_tensor("alibi_slopes", *alibi_slopes, query, at::kFloat,
                 per_batch ? at::IntArrayRef({p.batch, p.heads}) : at::IntArrayRef({p.heads}));
    operands.alibi_slopes = alibi_slopes->contiguous();
    p.alibi_slopes = operands.alibi_slopes.const_data_ptr<float>();
    p.stride_alibi_batch = per_batch ? p.heads : 0;
  }
  TORCH_CHECK_VALUE(scoring.dropout_p >= 0.0 && scoring.dropout_p <= 1.0,
                    "attention: dropout_p must be in [0, 1], got ", scoring.dropout_p, ".");
  if (scoring.dropout_p > 0.0) {
    TORCH_CHECK_VALUE(rng_state.has_value(), "attention: dropout_p > 0 needs rng_state.");
    check_tensor("rng_state", *rng_state, query, at::kLong, {2});
    TORCH_CHECK_VALUE(rng_state->is_contiguous(), "attention: rng_state must be contiguous.");
    p.dropout_p = scoring.dropout_p;
    p.rng_state = rng_state->const_data_ptr<int64_t>();
  }
  return operands;
}

void fill_value_and_sinks(AttentionParams& p, Operands& operands, const Tensor& query, const Tensor& value,
                          const OptionalTensor& sinks) {
  p.head_dim_v = value.size(3);
  operands.value = is_cached(p) ? value : with_contiguous_rows(value);
  p.v = operand(operands.value);
  if (sinks.has_value()) {
    TORCH_CHECK_TYPE(sinks->is_floating_point(), "attention: sinks must be floating, got ", sinks->scalar_type(), ".");
    check_tensor("sinks", *sinks, query, sinks->scalar_type(), {p.heads});
    operands.sinks = sinks->to(statistics_dtype(query)).contiguous();
    p.sinks = operands.sinks.const_data_ptr();
  }
}

}  // namespace fastattn
