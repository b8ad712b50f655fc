// Torch glue of the linear layer: checks what memory safety needs, allocates, fills params, calls the kernel.
#include "linear/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
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

// --- Gradients -------------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& linear_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastattn::linear", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>();
  return op;
}

Tensor linear_without_grad(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                           c10::string_view activation) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_op().call(input, weight, bias, activation);
}

// a @ b. The kernel wants b by columns and a by rows; copying them so pays where each is used often enough.
Tensor product(const Tensor& a, const Tensor& b) {
  constexpr int64_t kWorthCopying = 64, kAnyRows = std::numeric_limits<int64_t>::max();
  const bool large = std::min({a.size(0), a.size(1), b.size(1)}) >= kWorthCopying;
  const bool taken = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat;
  if (large && taken && linear_max_rows(DType::kFloat32) == kAnyRows) {
    return linear_op().call(a, b.t(), std::nullopt, "none");
  }
  return a.mm(b);
}

// Without activation, whose gradient would need what it was applied to.
struct Product : torch::autograd::Function<Product> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    // Kept only where a gradient needs it: a frozen weight's layer holds no input.
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()});
    return linear_without_grad(input, weight, bias, "none");
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    const Tensor dout = grads[0].reshape({-1, grads[0].size(-1)});
    Tensor dinput, dweight, dbias;
    if (ctx->needs_input_grad(0)) {
      at::DimVector shape(grads[0].sizes());
      shape.back() = weight.size(1);
      dinput = product(dout, weight).view(shape);
    }
    if (ctx->needs_input_grad(1)) dweight = product(dout.t(), input.reshape({-1, input.size(-1)}));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) dbias = dout.sum(0);
    return {dinput, dweight, dbias};
  }
};

Tensor activated(const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return at::relu(x);
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case Activation::kSilu:
      return at::silu(x);
  }
  return x;
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation) {
  const bool wants_grad = at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() ||
                                                         (bias.has_value() && bias->requires_grad()));
  if (!wants_grad) return linear_without_grad(input, weight, bias, activation);
  return activated(Product::apply(input, weight, bias), parse_activation(kOp, activation));
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
