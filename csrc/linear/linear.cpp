// Torch glue of the linear layer: checks what memory safety needs, allocates, fills params, calls the kernel.
#include "linear/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "common/check.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "linear";

void check_like(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK_VALUE(tensor.device() == input.device() && tensor.layout() == at::kStrided, kOp, ": ", name,
                    " must be a dense tensor on ", input.device(), ", got ", tensor.layout(), " on ", tensor.device(),
                    ".");
  TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), kOp, ": ", name, " must be ", input.scalar_type(),
                   " like input, got ", tensor.scalar_type(), ".");
}

Tensor with_contiguous_rows(const Tensor& matrix) {
  return matrix.size(1) > 1 && matrix.stride(1) != 1 ? matrix.contiguous() : matrix;
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  check_like("input", input, input);
  check_like("weight", weight, input);
  LinearParams p;
  p.dtype = kernel_dtype(kOp, input.scalar_type());
  TORCH_CHECK_TYPE(p.dtype != DType::kFloat64, kOp, ": input must be float32, bfloat16 or float16, got float64.");
  TORCH_CHECK_VALUE(weight.dim() == 2, kOp, ": weight must have 2 dimensions, got shape ", weight.sizes(), ".");
  p.columns = weight.size(0);
  p.depth = weight.size(1);
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == p.depth, kOp, ": input has shape ", input.sizes(),
                    " but weight has shape ", weight.sizes(), "; the last dim of input must be ", p.depth, ".");
  p.rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  // A view where the strides allow one.
  const Tensor input_rows = with_contiguous_rows(input.reshape({p.rows, p.depth}));
  const Tensor weight_rows = with_contiguous_rows(weight);
  p.input = input_rows.const_data_ptr();
  p.stride_input = input_rows.stride(0);
  p.weight = weight_rows.const_data_ptr();
  p.stride_weight = weight_rows.stride(0);
  Tensor bias_kept;
  if (bias.has_value()) {
    check_like("bias", *bias, input);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.columns, kOp, ": bias has shape ", bias->sizes(),
                      "; it must be (", p.columns, ",).");
    bias_kept = bias->contiguous();
    p.bias = bias_kept.const_data_ptr();
  }
  p.activation = parse_activation(kOp, activation);
  at::DimVector out_shape(input.sizes());
  out_shape.back() = p.columns;
  Tensor out = at::empty(out_shape, input.options());
  p.out = out.mutable_data_ptr();
  if (out.numel() > 0) FASTATTN_CPU_DISPATCH(linear_cpu, p);
  return out;
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::linear", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>();
  const bool wants_grad = at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() ||
                                                         (bias.has_value() && bias->requires_grad()));
  TORCH_CHECK_NOT_IMPLEMENTED(!wants_grad, kOp,
                              ": has no backward; use torch.nn.functional.linear where a gradient is wanted.");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(input, weight, bias, activation);
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

int64_t linear_max_rows(DType dtype) {
  static const bool intel = is_intel();
  // A compiler's vectors of 4 do not beat a library written for the processor.
  if (active_isa() < Isa::kAvx2) return 0;
  // From there on packing pays, and 16-bit products of the hardware's own.
  if (dtype != DType::kFloat32) return 8;
  // MKL keeps its AVX-512 kernels for Intel's processors: on others, no number of rows makes it as fast.
  const bool mkl_is_narrower = active_isa() >= Isa::kAvx512 && !intel;
  return mkl_is_narrower ? std::numeric_limits<int64_t>::max() : 32;
}

TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("linear", &linear); }
TORCH_LIBRARY_IMPL(fastattn, Autograd, m) { m.impl("linear", &linear_autograd); }

}  // namespace fastattn
