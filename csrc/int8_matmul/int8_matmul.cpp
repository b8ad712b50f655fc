// Torch glue of the INT8 ops: checks what memory safety needs, allocates, fills params, calls the kernels of the
// tensors' device, and gives int8_linear its gradient.
#include "int8_matmul/int8_matmul.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/device_launch.h"
#include "int8_matmul/int8_packed_weight.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType element_dtype(const char* op, const char* argument, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument, " must be float32, bfloat16, float16 or float64, got ", dtype, ".");
  }
}

// `device` is that of the op's first tensor.
void check_device(const char* op, const char* name, const Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " must be on ", device, ", got ", tensor.device(), ".");
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, at::Device device, int64_t dim,
                  at::ScalarType dtype) {
  check_device(op, name, tensor, device);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", tensor.scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ", tensor.sizes(),
                    ".");
}

// (..., K) as a matrix of rows at one stride; a copy only where the strides allow none. `storage` keeps the copy alive.
struct Rows {
  Tensor storage;
  int64_t count = 0, depth = 0, stride = 0;

  explicit Rows(const Tensor& input) : storage(input), depth(input.size(-1)) {
    if (input.is_contiguous()) {
      count = depth > 0 ? input.numel() / depth : c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
      stride = depth;
      return;
    }
    count = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
    storage = input.reshape({count, depth});
    // Expanded rows (stride 0) are read in place; a row itself has to be contiguous.
    if (depth > 1 && storage.stride(1) != 1) storage = storage.contiguous();
    stride = storage.stride(0);
  }
};

// Rows become blocks of a grid. Asked before anything is allocated: an expanded tensor of any size takes no memory.
void check_grid(const char* op, const char* name, const Tensor& tensor) {
  if (!runs_cuda_kernels(tensor)) return;
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  TORCH_CHECK_NOT_IMPLEMENTED(rows <= kMaxGridBlocks, op, ": the CUDA kernels take up to 2^31 - 1 rows, got ", name,
                              " ", tensor.sizes(), ".");
}

Tensor with_contiguous_rows(const Tensor& matrix) {
  return matrix.size(1) > 1 && matrix.stride(1) != 1 ? matrix.contiguous() : matrix;
}

// --- quantize_int8 ---

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "quantize_int8: input must have at least one dimension.");
  check_grid("quantize_int8", "input", input);
  const Rows rows(input.scalar_type() == at::kDouble ? input.to(at::kFloat) : input);
  Tensor q = at::empty(input.sizes(), input.options().dtype(at::kChar).memory_format(at::MemoryFormat::Contiguous));
  Tensor scale = at::empty(input.sizes().slice(0, input.dim() - 1), input.options().dtype(at::kFloat));
  QuantizeInt8Params p;
  p.rows = rows.count;
  p.depth = rows.depth;
  p.dtype = element_dtype("quantize_int8", "input", rows.storage.scalar_type());
  p.input = rows.storage.const_data_ptr();
  p.stride_input = rows.stride;
  p.q = q.mutable_data_ptr<int8_t>();
  p.stride_q = rows.depth;
  p.scale = scale.mutable_data_ptr<float>();
  if (runs_cuda_kernels(input)) {
    run_on_device("quantize_int8", input, quantize_int8_cuda, p);
  } else {
    FASTATTN_CPU_DISPATCH(quantize_int8_cpu, p);
  }
  return {q, scale};
}

// --- int8_matmul and int8_linear ---

// Fills columns, depth, b, b_scale and bias. `weight` and `bias` must outlive the call, as contiguous as they come
// back.
void set_weight(const char* op, Int8MatmulParams& p, at::Device device, Tensor& weight, Tensor& weight_scale,
                OptionalTensor& bias) {
  check_tensor(op, "weight", weight, device, 2, at::kChar);
  check_tensor(op, "weight_scale", weight_scale, device, 1, at::kFloat);
  check_grid(op, "weight", weight);
  p.columns = weight.size(0);
  TORCH_CHECK_VALUE(weight.size(1) == p.depth, op, ": weight has shape ", weight.sizes(),
                    " but the input's last dim is ", p.depth, "; weight must be (", p.columns, ", ", p.depth, ").");
  TORCH_CHECK_VALUE(weight_scale.size(0) == p.columns, op, ": weight_scale has shape ", weight_scale.sizes(),
                    "; it must be (", p.columns, ",).");
  TORCH_CHECK_NOT_IMPLEMENTED(p.depth <= kInt8MaxDepth, op, ": K is ", p.depth, ", and from ", kInt8MaxDepth + 1,
                              " on the int32 sum may overflow. Use backend='eager' or split K.");
  weight = with_contiguous_rows(weight);
  weight_scale = weight_scale.contiguous();
  p.b = weight.const_data_ptr<int8_t>();
  p.stride_b = weight.stride(0);
  p.b_scale = weight_scale.const_data_ptr<float>();
  if (!bias.has_value()) return;
  check_device(op, "bias", *bias, device);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.columns, op, ": bias has shape ", bias->sizes(),
                    "; it must be (", p.columns, ",).");
  bias = bias->scalar_type() == at::kDouble ? bias->to(at::kFloat) : bias->contiguous();
  p.bias_dtype = element_dtype(op, "bias", bias->scalar_type());
  p.bias = bias->const_data_ptr();
}

void run_on_cpu(Int8MatmulParams& p, const at::TensorOptions& options) {
  const int64_t bytes = FASTATTN_CPU_DISPATCH(int8_matmul_workspace_bytes, p);
  // What a row or two need is on the stack sooner than a tensor is made.
  alignas(64) std::byte small[32 * 1024];
  Tensor large;
  if (bytes <= static_cast<int64_t>(sizeof small)) {
    p.workspace = small;
  } else {
    large = at::empty({bytes}, options.dtype(at::kByte));
    p.workspace = large.mutable_data_ptr();
  }
  FASTATTN_CPU_DISPATCH(int8_matmul_cpu, p);
}

// Allocates the output (float64 is computed in float32) and the workspace, and runs. `input` is the op's first tensor.
Tensor run(const char* op, Int8MatmulParams& p, const Tensor& input, at::IntArrayRef out_shape,
           at::ScalarType out_dtype) {
  const at::TensorOptions options = input.options();
  const at::ScalarType computed = out_dtype == at::kDouble ? at::kFloat : out_dtype;
  p.out_dtype = element_dtype(op, "out_dtype", computed);
  Tensor out = at::empty(out_shape, options.dtype(computed));
  p.out = out.mutable_data_ptr();
  if (runs_cuda_kernels(input)) {
    run_on_device(op, input, int8_matmul_cuda, p, int8_matmul_cuda_workspace_bytes);
  } else {
    run_on_cpu(p, options);
  }
  return out_dtype == at::kDouble ? out.to(at::kDouble) : out;
}

Tensor int8_matmul(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                   const OptionalTensor& bias, c10::string_view activation, at::ScalarType out_dtype) {
  constexpr const char* kOp = "int8_matmul";
  check_tensor(kOp, "a", a, a.device(), 2, at::kChar);
  check_tensor(kOp, "a_scale", a_scale, a.device(), 1, at::kFloat);
  TORCH_CHECK_VALUE(a_scale.size(0) == a.size(0), kOp, ": a_scale has shape ", a_scale.sizes(), "; it must be (",
                    a.size(0), ",).");
  check_grid(kOp, "a", a);
  const Tensor a_rows = with_contiguous_rows(a), a_scales = a_scale.contiguous();
  Int8MatmulParams p;
  p.rows = a.size(0);
  p.depth = a.size(1);
  p.a = a_rows.const_data_ptr();
  p.stride_a = a_rows.stride(0);
  p.a_scale = a_scales.const_data_ptr<float>();
  p.activation = parse_activation(kOp, activation);
  Tensor weight = b, weight_scale = b_scale;
  OptionalTensor bias_kept = bias;
  set_weight(kOp, p, a.device(), weight, weight_scale, bias_kept);
  return run(kOp, p, a, {p.rows, p.columns}, out_dtype);
}

// Torch does not count the changes of tensors made in inference mode: nothing packed from them can be trusted later.
bool has_version(const Tensor& tensor) { return !tensor.is_inference(); }

}  // namespace

bool is_packed_form_of(const Tensor& packed, const Tensor& weight) {
  if (!has_version(weight) || !packed.device().is_cpu() || packed.scalar_type() != at::kChar ||
      !packed.is_contiguous() || packed.numel() != int8_packed_bytes(weight.size(0), weight.size(1))) {
    return false;
  }
  PackedWeightHeader header;
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  return header.magic == kPackedWeightMagic && header.columns == weight.size(0) && header.depth == weight.size(1) &&
         header.source == reinterpret_cast<uint64_t>(weight.const_data_ptr()) &&
         header.source_version == static_cast<uint64_t>(weight._version());
}

namespace {

Tensor linear(const Tensor& input, const Tensor* packed, const Tensor& weight, const Tensor& weight_scale,
              const OptionalTensor& bias, c10::string_view activation) {
  constexpr const char* kOp = "int8_linear";
  TORCH_CHECK_VALUE(input.dim() >= 1, kOp, ": input must have at least one dimension.");
  check_grid(kOp, "input", input);
  const Rows rows(input.scalar_type() == at::kDouble ? input.to(at::kFloat) : input);
  Int8MatmulParams p;
  p.rows = rows.count;
  p.depth = rows.depth;
  p.a_dtype = element_dtype(kOp, "input", rows.storage.scalar_type());
  p.a = rows.storage.const_data_ptr();
  p.stride_a = rows.stride;
  p.activation = parse_activation(kOp, activation);
  Tensor weight_kept = weight, scale_kept = weight_scale;
  OptionalTensor bias_kept = bias;
  set_weight(kOp, p, input.device(), weight_kept, scale_kept, bias_kept);
  if (packed != nullptr && is_packed_form_of(*packed, weight)) p.b_packed = packed->const_data_ptr();
  at::DimVector out_shape(input.sizes());
  out_shape.back() = p.columns;
  return run(kOp, p, rows.storage, out_shape, input.scalar_type());
}

Tensor int8_linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                   c10::string_view activation) {
  return linear(input, nullptr, weight, weight_scale, bias, activation);
}

Tensor int8_linear_packed(const Tensor& input, const Tensor& packed_weight, const Tensor& weight,
                          const Tensor& weight_scale, const OptionalTensor& bias, c10::string_view activation) {
  return linear(input, &packed_weight, weight, weight_scale, bias, activation);
}

Tensor int8_pack_weight(const Tensor& weight) {
  check_tensor("int8_pack_weight", "weight", weight, at::kCPU, 2, at::kChar);
  const Tensor rows = with_contiguous_rows(weight);
  const int64_t columns = weight.size(0), depth = weight.size(1);
  Tensor packed = at::empty({int8_packed_bytes(columns, depth)}, weight.options());
  PackedWeightHeader header{};
  header.magic = kPackedWeightMagic;
  header.columns = columns;
  header.depth = depth;
  // An address of 0 is no weight's: this packed form will not be used.
  header.source = has_version(weight) ? reinterpret_cast<uint64_t>(weight.const_data_ptr()) : 0;
  header.source_version = has_version(weight) ? weight._version() : 0;
  std::memcpy(packed.mutable_data_ptr(), &header, sizeof header);
  FASTATTN_CPU_DISPATCH(int8_pack_weight_cpu, rows.const_data_ptr<int8_t>(), rows.stride(0), columns, depth,
                        packed.mutable_data_ptr());
  return packed;
}

// --- Gradient of int8_linear ---

// Below autograd.
Tensor call_linear(const Tensor& input, const OptionalTensor& packed, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, c10::string_view activation) {
  static const auto plain_op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastattn::int8_linear", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>();
  static const auto packed_op = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("fastattn::int8_linear_packed", "")
                                    .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  const OptionalTensor&, c10::string_view)>();
  at::AutoDispatchBelowADInplaceOrView guard;
  if (packed.has_value()) return packed_op.call(input, *packed, weight, weight_scale, bias, activation);
  return plain_op.call(input, weight, weight_scale, bias, activation);
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

Tensor silu_gradient(const Tensor& dout, const Tensor& preactivation) {
  if (!at::GradMode::is_enabled()) return at::silu_backward(dout, preactivation);
  // PyTorch does not differentiate that again.
  const Tensor sigmoid = at::sigmoid(preactivation);
  return dout * sigmoid * (1 + preactivation * (1 - sigmoid));
}

Tensor activation_backward(Activation activation, const Tensor& dout, const Tensor& preactivation) {
  switch (activation) {
    case Activation::kNone:
      return dout;
    case Activation::kRelu:
      return at::threshold_backward(dout, preactivation, 0);
    case Activation::kGelu:
      return at::gelu_backward(dout, preactivation, "none");
    case Activation::kGeluTanh:
      return at::gelu_backward(dout, preactivation, "tanh");
    case Activation::kSilu:
      return silu_gradient(dout, preactivation);
  }
  return dout;
}

Tensor linear_autograd(const Tensor& input, const OptionalTensor& packed, const Tensor& weight,
                       const Tensor& weight_scale, const OptionalTensor& bias, c10::string_view activation);

// Straight through the rounding of the input: dinput = (dout * activation') @ (weight * weight_scale), in fp32, both
// times where it is differentiated twice.
class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  // input and bias come first: needs_input_grad counts the tensors that are there.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const OptionalTensor& bias,
                        const OptionalTensor& packed, const Tensor& weight, const Tensor& weight_scale,
                        c10::string_view activation) {
    const bool linear_only = parse_activation("int8_linear", activation) == Activation::kNone;
    // The pre-activation is computed again in backward: that costs less than keeping it.
    ctx->save_for_backward({linear_only ? Tensor() : input, linear_only ? Tensor() : packed.value_or(Tensor()), weight,
                            weight_scale, linear_only ? Tensor() : bias.value_or(Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["emulating"] = emulating();
    ctx->saved_data["input_dtype"] = input.scalar_type();
    if (bias.has_value()) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    return call_linear(input, packed, weight, weight_scale, bias, activation);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const EmulationScope scope(ctx->saved_data["emulating"].toBool());
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[2], &weight_scale = saved[3];
    const OptionalTensor packed = if_defined(saved[1]), bias = if_defined(saved[4]);
    Tensor dout = grads[0].to(at::kFloat);
    const Activation activation = parse_activation("int8_linear", ctx->saved_data["activation"].toStringRef());
    if (activation != Activation::kNone) {
      // Activation' depends on input and bias, too, which counts where this gradient is differentiated again.
      const Tensor preactivation = linear_autograd(input.to(at::kFloat), packed, weight, weight_scale, bias, "none");
      dout = activation_backward(activation, dout, preactivation);
    }
    Tensor dinput, dbias;
    if (ctx->needs_input_grad(0)) {
      const Tensor dequantized = weight.to(at::kFloat) * weight_scale.unsqueeze(1);
      dinput = at::matmul(dout, dequantized).to(ctx->saved_data["input_dtype"].toScalarType());
    }
    if (ctx->saved_data.count("bias_dtype") != 0 && ctx->needs_input_grad(1)) {
      at::DimVector leading;
      for (int64_t dim = 0; dim + 1 < dout.dim(); ++dim) leading.push_back(dim);
      dbias = leading.empty() ? dout : dout.sum(leading);
      dbias = dbias.to(ctx->saved_data["bias_dtype"].toScalarType());
    }
    return {dinput, dbias, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor linear_autograd(const Tensor& input, const OptionalTensor& packed, const Tensor& weight,
                       const Tensor& weight_scale, const OptionalTensor& bias, c10::string_view activation) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && weight_scale.requires_grad()),
                    "int8_linear: weight_scale requires grad, but only input and bias get one; detach it.");
  const bool needs_grad =
      at::GradMode::is_enabled() && (input.requires_grad() || (bias.has_value() && bias->requires_grad()));
  if (!needs_grad) return call_linear(input, packed, weight, weight_scale, bias, activation);
  return LinearFunction::apply(input, bias, packed, weight, weight_scale, activation);
}

Tensor int8_linear_autograd(const Tensor& input, const Tensor& weight, const Tensor& weight_scale,
                            const OptionalTensor& bias, c10::string_view activation) {
  return linear_autograd(input, std::nullopt, weight, weight_scale, bias, activation);
}

Tensor int8_linear_packed_autograd(const Tensor& input, const Tensor& packed_weight, const Tensor& weight,
                                   const Tensor& weight_scale, const OptionalTensor& bias,
                                   c10::string_view activation) {
  return linear_autograd(input, packed_weight, weight, weight_scale, bias, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("quantize_int8", &quantize_int8);
  m.impl("int8_matmul", &int8_matmul);
  m.impl("int8_linear", &int8_linear);
  m.impl("int8_linear_packed", &int8_linear_packed);
  m.impl("int8_pack_weight", &int8_pack_weight);
}

// The CUDA kernels read a weight as it is: there is nothing to pack, and a packed form is not looked at.
TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("quantize_int8", &quantize_int8);
  m.impl("int8_matmul", &int8_matmul);
  m.impl("int8_linear", &int8_linear);
  m.impl("int8_linear_packed", &int8_linear_packed);
}

TORCH_LIBRARY_IMPL(fastattn, Autograd, m) {
  m.impl("int8_linear", &int8_linear_autograd);
  m.impl("int8_linear_packed", &int8_linear_packed_autograd);
}

}  // namespace fastattn
