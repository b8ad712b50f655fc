// Torch glue of attention_with_kv_cache: one kernel appends and rotates, then attention reads keys and values where the
// cache has them. Lengths and tables stay on the device; where that is the CPU, their values are checked before
// anything is written.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "attention/attention_glue.h"
#include "attention/kv_cache.h"
#include "common/check.h"
#include "common/device_launch.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "attention_with_kv_cache";

// --- Checks ---------------------------------------------------------------------------------------------------------

void check_operand(const char* name, const Tensor& tensor, const Tensor& query, int64_t dims) {
  TORCH_CHECK_VALUE(tensor.device() == query.device() && tensor.layout() == at::kStrided, kOp, ": ", name,
                    " must be a dense tensor on ", query.device(), ", as query is; got ", tensor.layout(), " on ",
                    tensor.device(), ".");
  TORCH_CHECK_VALUE(tensor.dim() == dims, kOp, ": ", name, " must have ", dims, " dims, got ", tensor.sizes(), ".");
}

void check_rows(const char* name, const Tensor& tensor, const Tensor& query, at::IntArrayRef shape) {
  check_operand(name, tensor, query, 4);
  TORCH_CHECK_TYPE(tensor.scalar_type() == query.scalar_type(), kOp, ": ", name, " must be ", query.scalar_type(),
                   ", got ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, kOp, ": ", name, " must be ", shape, ", got ", tensor.sizes(), ".");
}

void check_indices(const char* name, const Tensor& tensor, const Tensor& query, int64_t dims) {
  check_operand(name, tensor, query, dims);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, kOp, ": ", name,
                   " must be int32 or int64, got ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.size(0) == query.size(0), kOp, ": ", name, " must have the batch of query, ", query.size(0),
                    ", got ", tensor.sizes(), ".");
}

// What a call appends, rotates and has room for. `positions`: rows of the rotation's tables, or -1 without rotation.
struct Step {
  int64_t appended, rotated, capacity, positions;
};

void check_length(int64_t length, const Step& step) {
  TORCH_CHECK_VALUE(length >= 0, kOp, ": cache_seqlens must be >= 0, got ", length, ".");
  TORCH_CHECK_VALUE(length + step.appended <= step.capacity, kOp, ": cache_seqlens ", length, " and ", step.appended,
                    " new tokens exceed the cache, which holds ", step.capacity, ".");
  TORCH_CHECK_VALUE(step.positions < 0 || length + step.rotated <= step.positions, kOp, ": rotary_cos has ",
                    step.positions, " positions, but ", length + step.rotated, " are needed (cache_seqlens ", length,
                    " and ", step.rotated, " tokens).");
}

// Raises for lengths and table entries that kernels would clip.
void check_values(const OptionalTensor& lengths, int64_t length, const OptionalTensor& table, const Step& step,
                  int64_t block_size, int64_t entries, int64_t batch) {
  const Tensor each = lengths.has_value() ? lengths->to(at::kLong).contiguous() : at::full({batch}, length, at::kLong);
  const auto* length_of = each.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) check_length(length_of[b], step);
  if (!table.has_value()) return;
  const Tensor entry_of = table->to(at::kLong).contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = entry_of.const_data_ptr<int64_t>() + b * entry_of.size(1);
    for (int64_t i = 0; i * block_size < length_of[b] + step.appended; ++i) {
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < entries, kOp, ": block_table[", b, ", ", i, "] is ", row[i],
                        ", but key_cache has blocks 0 to ", entries - 1, ".");
    }
  }
}

// --- The cache ------------------------------------------------------------------------------------------------------

// Of int64 numbers, which lie lowest byte first, the kernels read the low half.
struct Indices {
  const int32_t* data;
  int64_t words;  // of an element
};

Indices indices(const Tensor& tensor) {
  return {static_cast<const int32_t*>(tensor.const_data_ptr()), tensor.scalar_type() == at::kLong ? 2 : 1};
}

KvCache make_cache(const Tensor& key_cache, const OptionalTensor& lengths, int64_t length, const OptionalTensor& table,
                   const Step& step) {
  const int64_t most_tokens = runs_cuda_kernels(key_cache) ? kMaxCudaSeqlen : INT32_MAX;
  TORCH_CHECK_NOT_IMPLEMENTED(
      step.capacity <= most_tokens && key_cache.size(0) <= INT32_MAX, kOp, ": its kernels take caches of up to ",
      most_tokens, " tokens a sequence and 2^31 - 1 blocks, got ", step.capacity, " and ", key_cache.size(0), ".");
  KvCache cache;
  cache.length = static_cast<int>(length), cache.appended = static_cast<int>(step.appended);
  cache.capacity = static_cast<int>(step.capacity), cache.block_size = static_cast<int>(key_cache.size(1));
  cache.entries = static_cast<int>(key_cache.size(0));
  if (lengths.has_value()) {
    const auto [data, words] = indices(*lengths);
    cache.lengths = data, cache.stride_length = words * lengths->stride(0);
  }
  if (table.has_value()) {
    const auto [data, words] = indices(*table);
    cache.table = data, cache.stride_table = words * table->stride(0), cache.stride_block = words * table->stride(1);
  }
  return cache;
}

// --- Appending and rotating -----------------------------------------------------------------------------------------

bool has_contiguous_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 || tensor.size(-1) <= 1; }

// (batch, tokens, heads, head_dim).
AttentionTensor token_rows(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(2), tensor.stride(1)};
}

AppendedRows appended_rows(const Tensor& from, const Tensor& to, bool is_rotated, bool to_cache) {
  return {token_rows(from), token_rows(to), from.size(1), from.size(2), from.size(3), is_rotated, to_cache};
}

// cos and sin in a dtype that the kernel reads, fp32 or the operands' own (fp64 for fp64), whose rows are contiguous.
std::tuple<Tensor, Tensor> angle_rows(const Tensor& cos, const Tensor& sin, at::ScalarType operands) {
  const bool own = operands == at::kDouble || (cos.scalar_type() == operands && sin.scalar_type() == operands);
  const auto rows = [&](const Tensor& angles) {
    const Tensor converted = angles.to(own ? operands : at::kFloat);
    return has_contiguous_rows(converted) ? converted : converted.contiguous();
  };
  return {rows(cos), rows(sin)};
}

// Appends key and value if there are any, and returns the query, rotated if there is a rotation.
Tensor append_and_rotate(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                         const OptionalTensor& key, const OptionalTensor& value, const OptionalTensor& rotary_cos,
                         const OptionalTensor& rotary_sin, bool rotary_interleaved, const KvCache& cache) {
  KvAppendParams p;
  p.dtype = kernel_dtype(kOp, query.scalar_type());
  p.batch = query.size(0);
  p.cache = cache;
  p.is_interleaved = rotary_interleaved;
  Tensor from_query = query, to_query = query, from_key, from_value, cos, sin;
  if (rotary_cos.has_value()) {
    std::tie(cos, sin) = angle_rows(*rotary_cos, *rotary_sin, query.scalar_type());
    p.cos = cos.const_data_ptr(), p.sin = sin.const_data_ptr();
    p.angle_dtype = kernel_dtype(kOp, cos.scalar_type());
    p.stride_cos = cos.stride(0), p.stride_sin = sin.stride(0);
    p.positions = cos.size(0), p.rotary_dim = 2 * cos.size(1);
    from_query = has_contiguous_rows(query) ? query : query.contiguous();
    to_query = at::empty(query.sizes(), query.options());
    if (query.numel() > 0) p.operands[p.operand_count++] = appended_rows(from_query, to_query, true, false);
  }
  if (cache.appended > 0 && key->numel() + value->numel() > 0) {
    from_key = has_contiguous_rows(*key) ? *key : key->contiguous();
    from_value = has_contiguous_rows(*value) ? *value : value->contiguous();
    p.operands[p.operand_count++] = appended_rows(from_key, key_cache, rotary_cos.has_value(), true);
    p.operands[p.operand_count++] = appended_rows(from_value, value_cache, false, true);
    for (const Tensor& written : {key_cache, value_cache}) {
      if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
    }
  }
  if (p.operand_count > 0 && runs_cuda_kernels(query)) {
    run_on_device(kOp, query, kv_append_cuda, p);
  } else if (p.operand_count > 0) {
    FASTATTN_CPU_DISPATCH(kv_append_cpu, p);
  }
  return to_query;
}

// --- The op ---------------------------------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor>;

// What kernels address by: shapes, dtypes and devices. Python has said what they mean.
Step check_call(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& key,
                const OptionalTensor& value, const OptionalTensor& cache_seqlens, const OptionalTensor& block_table,
                const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin) {
  check_operand("query", query, query, 4);
  check_operand("key_cache", key_cache, query, 4);
  check_operand("value_cache", value_cache, query, 4);
  const int64_t batch = query.size(0), heads_kv = key_cache.size(2), head_dim_v = value_cache.size(3);
  const int64_t entries = key_cache.size(0), block_size = key_cache.size(1);
  check_rows("key_cache", key_cache, query, {entries, block_size, heads_kv, query.size(3)});
  check_rows("value_cache", value_cache, query, {entries, block_size, heads_kv, head_dim_v});
  if (cache_seqlens.has_value()) check_indices("cache_seqlens", *cache_seqlens, query, 1);
  if (block_table.has_value()) check_indices("block_table", *block_table, query, 2);
  TORCH_CHECK_VALUE(block_table.has_value() || entries == batch, kOp, ": query has batch ", batch,
                    " but key_cache has ", entries, "; they must be equal, or block_table must be given.");
  TORCH_CHECK_VALUE(key.has_value() == value.has_value(), kOp, ": key and value must be given together, or neither.");
  Step step{key.has_value() ? key->size(1) : 0, 0, block_size, -1};
  if (key.has_value()) {
    check_rows("key", *key, query, {batch, step.appended, heads_kv, query.size(3)});
    check_rows("value", *value, query, {batch, step.appended, heads_kv, head_dim_v});
  }
  step.rotated = std::max(step.appended, query.size(1));
  if (block_table.has_value()) step.capacity = entries > 0 ? block_table->size(1) * block_size : 0;
  TORCH_CHECK_VALUE(rotary_cos.has_value() == rotary_sin.has_value(), kOp,
                    ": rotary_cos and rotary_sin must be given together.");
  if (rotary_cos.has_value()) {
    check_operand("rotary_cos", *rotary_cos, query, 2);
    check_operand("rotary_sin", *rotary_sin, query, 2);
    TORCH_CHECK_VALUE(rotary_cos->sizes() == rotary_sin->sizes() && 2 * rotary_cos->size(1) <= query.size(3), kOp,
                      ": rotary_cos and rotary_sin must be (positions, rotary_dim / 2) with rotary_dim <= head_dim ",
                      query.size(3), ", got ", rotary_cos->sizes(), " and ", rotary_sin->sizes(), ".");
    step.positions = rotary_cos->size(0);
  }
  return step;
}

// What queries attend to, in the layout of attention_forward.
struct Attended {
  Tensor keys, values;
  Scoring scoring;
};

// All that the caches of `batch` sequences hold after the append. `cache` has to live as long as the result.
Attended attended(const Tensor& key_cache, const Tensor& value_cache, const KvCache& cache, bool host_knows_keys,
                  Scoring scoring, int64_t batch) {
  Tensor keys = key_cache, values = value_cache;
  if (cache.capacity == 0) {
    keys = keys.new_empty({batch, 0, keys.size(2), keys.size(3)});
    values = values.new_empty({batch, 0, values.size(2), values.size(3)});
  } else if (host_knows_keys) {
    // Which lets it choose among all kernels.
    keys = keys.narrow(1, 0, cache.length + cache.appended);
    values = values.narrow(1, 0, cache.length + cache.appended);
  } else {
    scoring.cache = &cache;
  }
  return {keys.transpose(1, 2), values.transpose(1, 2), scoring};
}

Outputs attention_with_kv_cache(const Tensor& query, Tensor key_cache, Tensor value_cache, const OptionalTensor& key,
                                const OptionalTensor& value, const OptionalTensor& cache_seqlens, int64_t cache_seqlen,
                                const OptionalTensor& block_table, const OptionalTensor& rotary_cos,
                                const OptionalTensor& rotary_sin, bool rotary_interleaved,
                                const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, bool is_causal,
                                double scale, int64_t window_left, int64_t window_right, double softcap) {
  const Step step =
      check_call(query, key_cache, value_cache, key, value, cache_seqlens, block_table, rotary_cos, rotary_sin);
  // A length of the caller's, or on a GPU the shortest that there may be.
  const int64_t length = cache_seqlens.has_value() ? 0 : cache_seqlen;
  if (query.size(0) > 0) check_length(length, step);
  if (query.is_cpu() && (!emulating() || emulator_checks_values())) {
    check_values(cache_seqlens, cache_seqlen, block_table, step, key_cache.size(1), key_cache.size(0), query.size(0));
  }
  if (!has_contiguous_rows(key_cache) || !has_contiguous_rows(value_cache)) {
    const Tensor key_rows = key_cache.contiguous(), value_rows = value_cache.contiguous();
    const Outputs outputs = attention_with_kv_cache(
        query, key_rows, value_rows, key, value, cache_seqlens, cache_seqlen, block_table, rotary_cos, rotary_sin,
        rotary_interleaved, alibi_slopes, sinks, is_causal, scale, window_left, window_right, softcap);
    key_cache.copy_(key_rows);
    value_cache.copy_(value_rows);
    return outputs;
  }

  const KvCache cache = make_cache(key_cache, cache_seqlens, length, block_table, step);
  const Tensor rotated =
      append_and_rotate(query, key_cache, value_cache, key, value, rotary_cos, rotary_sin, rotary_interleaved, cache);
  const bool host_knows_keys = !cache_seqlens.has_value() && !block_table.has_value();
  const Scoring scoring{0.0, is_causal, scale, window_left, window_right, /*bottom_right=*/true, softcap};
  const Attended to = attended(key_cache, value_cache, cache, host_knows_keys, scoring, query.size(0));
  const auto [out, lse] = attention_forward(rotated.transpose(1, 2), to.keys, to.values, std::nullopt, alibi_slopes,
                                            sinks, std::nullopt, to.scoring);
  return {out.transpose(1, 2), lse};
}

// Which kernels the call would run; it writes nothing.
std::string attention_with_kv_cache_kernels(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                            const OptionalTensor& key, const OptionalTensor& value,
                                            const OptionalTensor& cache_seqlens, int64_t cache_seqlen,
                                            const OptionalTensor& block_table, const OptionalTensor& rotary_cos,
                                            const OptionalTensor& rotary_sin, bool, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sinks, bool is_causal, double scale,
                                            int64_t window_left, int64_t window_right, double softcap) {
  const Step step =
      check_call(query, key_cache, value_cache, key, value, cache_seqlens, block_table, rotary_cos, rotary_sin);
  const int64_t length = cache_seqlens.has_value() ? 0 : cache_seqlen;
  if (query.size(0) > 0) check_length(length, step);
  // In place of what the call would copy or rotate, memory of the same layout.
  const auto as_read = [](const Tensor& x) { return has_contiguous_rows(x) ? x : at::empty(x.sizes(), x.options()); };
  const Tensor rotated = rotary_cos.has_value() ? at::empty(query.sizes(), query.options()) : query;
  const KvCache cache = make_cache(key_cache, cache_seqlens, length, block_table, step);
  const bool host_knows_keys = !cache_seqlens.has_value() && !block_table.has_value();
  const Scoring scoring{0.0, is_causal, scale, window_left, window_right, /*bottom_right=*/true, softcap};
  const Attended to =
      attended(as_read(key_cache), as_read(value_cache), cache, host_knows_keys, scoring, query.size(0));
  return attention_forward_kernels(rotated.transpose(1, 2), to.keys, to.values, alibi_slopes, sinks, to.scoring);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_with_kv_cache", &attention_with_kv_cache);
  m.impl("attention_with_kv_cache_kernels", &attention_with_kv_cache_kernels);
}
TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_with_kv_cache", &attention_with_kv_cache);
  m.impl("attention_with_kv_cache_kernels", &attention_with_kv_cache_kernels);
}

}  // namespace fastattn
