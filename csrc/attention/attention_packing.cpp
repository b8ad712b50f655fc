#include "attention/attention_packing.h"

namespace fastattn {
namespace {

template <typename Index>
void check_cu_seqlens(const char* name, const Index* cu_seqlens, int64_t batch, int64_t max_seqlen, int64_t total) {
  TORCH_CHECK_VALUE(cu_seqlens[0] == 0, "varlen_attention: ", name, " must start with 0, got ", cu_seqlens[0], ".");
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(cu_seqlens[b + 1] >= cu_seqlens[b], "varlen_attention: ", name, " must not fall, but sequence ",
                      b, " has a negative length.");
    if (cu_seqlens[b + 1] - cu_seqlens[b] > cu_seqlens[longest + 1] - cu_seqlens[longest]) longest = b;
  }
  TORCH_CHECK_VALUE(cu_seqlens[batch] <= total, "varlen_attention: ", name, " ends at ", cu_seqlens[batch],
                    ", but there are only ", total, " rows.");
  if (batch == 0) return;
  const int64_t most = cu_seqlens[longest + 1] - cu_seqlens[longest];
  TORCH_CHECK_VALUE(most <= max_seqlen, "varlen_attention: max_seqlen_", name[sizeof("cu_seqlens_") - 1], " is ",
                    max_seqlen, ", but sequence ", longest, " of ", name, " has ", most, " rows; pass at least that.");
}

}  // namespace

at::Tensor checked_cu_seqlens(const char* name, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                              const at::Tensor& rows, bool check_values) {
  const int64_t total = rows.size(2);
  TORCH_CHECK_VALUE(cu_seqlens.device() == rows.device() && cu_seqlens.layout() == at::kStrided,
                    "varlen_attention: ", name, " must be a dense tensor on ", rows.device(), ", got ",
                    cu_seqlens.layout(), " on ", cu_seqlens.device(), ".");
  const at::ScalarType dtype = cu_seqlens.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, "varlen_attention: ", name, " must be int32 or int64, got ",
                   dtype, ".");
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "varlen_attention: ", name,
                    " must be (batch + 1,), got shape ", cu_seqlens.sizes(), ".");
  TORCH_CHECK_VALUE(max_seqlen >= 0, "varlen_attention: max_seqlen must not be negative, got ", max_seqlen, ".");
  TORCH_CHECK_NOT_IMPLEMENTED(total <= INT32_MAX, "varlen_attention: the kernels take up to 2**31 - 1 rows, got ",
                              total, ". Use backend='eager'.");
  const at::Tensor contiguous = cu_seqlens.contiguous();
  const int64_t batch = contiguous.size(0) - 1;
  if (check_values && contiguous.is_cpu()) {
    if (dtype == at::kInt) {
      check_cu_seqlens(name, contiguous.const_data_ptr<int32_t>(), batch, max_seqlen, total);
    } else {
      check_cu_seqlens(name, contiguous.const_data_ptr<int64_t>(), batch, max_seqlen, total);
    }
  }
  return dtype == at::kInt ? contiguous : contiguous.clamp(0, total).to(at::kInt);
}

}  // namespace fastattn
