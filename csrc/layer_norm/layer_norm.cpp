// Torch glue of layer norm: checks what memory safety needs, copies what the kernels cannot address, allocates outputs,
// fills the parameters and calls the kernels of the tensors' device. layer_norm_autograd.cpp holds the gradients.
#include "layer_norm/layer_norm.h"

#include <ATen/ATen.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/device_launch.h"
#include "common/memory.h"

namespace fastattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::ScalarType statistics_dtype(at::ScalarType x) { return x == at::kDouble ? at::kDouble : at::kFloat; }

void check_dense(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK_VALUE(tensor.device() == input.device() && tensor.layout() == at::kStrided, op, ": ", name,
                    " must be a dense tensor on ", input.device(), ", got ", tensor.layout(), " on ", tensor.device(),
                    ".");
}

// `input` is the op's first tensor, whose device the others share.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& input, at::IntArrayRef shape,
                at::ScalarType dtype) {
  check_dense(op, name, tensor, input);
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " must be ", shape, ", got ", tensor.sizes(), ".");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", tensor.scalar_type(),
                   ".");
}

void check_input(const char* op, const Tensor& input, int64_t normalized_dims) {
  check_dense(op, "input", input, input);
  kernel_dtype(op, input.scalar_type());
  TORCH_CHECK_VALUE(normalized_dims >= 1 && normalized_dims <= input.dim(), op,
                    ": normalized_dims must be from 1 to the dims of input, got ", normalized_dims, " for input ",
                    input.sizes(), ".");
  if (!runs_cuda_kernels(input)) return;
  TORCH_CHECK_NOT_IMPLEMENTED(input.scalar_type() != at::kDouble, op,
                              ": the CUDA kernels take float32, bfloat16 and float16, got ", input.scalar_type(),
                              ". Use backend='auto'.");
  // Asked before anything is allocated: an expanded input of any size takes no memory.
  const auto elements = [&](int64_t begin, int64_t end) {
    return c10::multiply_integers(input.sizes().slice(begin, end - begin));
  };
  const int64_t rows = elements(0, input.dim() - normalized_dims);
  const int64_t cols = elements(input.dim() - normalized_dims, input.dim());
  TORCH_CHECK_NOT_IMPLEMENTED(rows <= kMaxGridBlocks && cols <= kMaxCudaCols, op,
                              ": the CUDA kernels take up to 2^31 - 1 rows of up to 2^30 elements, got ", rows,
                              " rows of ", cols, ".");
}

// --- Operands --------------------------------------------------------------------------------------------------------

// A tensor's dims as rows and columns.
struct Shape {
  Shape(const Tensor& x, int64_t normalized_dims)
      : leading(x.sizes().slice(0, x.dim() - normalized_dims)),
        normalized(x.sizes().slice(x.dim() - normalized_dims)),
        rows(c10::multiply_integers(leading)),
        cols(c10::multiply_integers(normalized)) {}
  at::IntArrayRef leading, normalized;
  int64_t rows, cols;
};

// The stride of dims [begin, end) walked as one, in C order, if there is one; `fallback` where they hold one element.
std::optional<int64_t> joint_stride(const Tensor& tensor, int64_t begin, int64_t end, int64_t fallback) {
  int64_t stride = fallback, expected = -1;
  for (int64_t dim = end - 1; dim >= begin; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (expected == -1) {
      stride = expected = tensor.stride(dim);
    } else if (tensor.stride(dim) != expected) {
      return std::nullopt;
    }
    expected *= tensor.size(dim);
  }
  return stride;
}

// A tensor that the kernel can address; a copy only where the caller's cannot be.
struct Rows {
  Rows(const Tensor& original, const Shape& shape) : tensor(original) {
    const int64_t leading_dims = original.dim() - static_cast<int64_t>(shape.normalized.size());
    std::optional<int64_t> stride;
    if (joint_stride(original, leading_dims, original.dim(), 1) == 1) {
      stride = joint_stride(original, 0, leading_dims, shape.cols);
    }
    if (!stride) {
      tensor = original.contiguous();
      stride = shape.cols;
    }
    view = {tensor.data_ptr(), *stride};
  }
  Tensor tensor;
  RowTensor view;
};

// at::empty without its trips through the dispatcher, which count at 128 rows of 768: the backward allocates four
// times.
Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? at::cpu::empty(sizes, options) : at::empty(sizes, options);
}

Tensor empty_output(const Tensor& like, at::ScalarType dtype) {
  Tensor output = new_empty(like.sizes(), like.options().dtype(dtype));
  if (output.is_cpu()) advise_huge_pages(output.data_ptr(), static_cast<int64_t>(output.nbytes()));
  return output;
}

RowTensor output_rows(const Tensor& output, const Shape& shape) { return {output.data_ptr(), shape.cols}; }

// A weight or bias as the kernels read it: contiguous, of the statistics' dtype.
Tensor parameter(const char* op, const char* name, const Tensor& given, const Tensor& input, at::IntArrayRef shape,
                 at::ScalarType dtype) {
  check_dense(op, name, given, input);
  TORCH_CHECK_TYPE(given.is_floating_point(), op, ": ", name, " must be floating, got ", given.scalar_type(), ".");
  TORCH_CHECK_VALUE(given.sizes() == shape, op, ": ", name, " must be ", shape, ", got ", given.sizes(), ".");
  return given.scalar_type() == dtype && given.is_contiguous() ? given : given.to(dtype).contiguous();
}

// Checks rng_state and fills in dropout.
template <typename Params>
void fill_dropout(const char* op, Params& p, const OptionalTensor& rng_state, double dropout_p, const Tensor& input) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be in [0, 1], got ", dropout_p, ".");
  if (dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(rng_state.has_value(), op, ": dropout_p = ", dropout_p, " needs rng_state.");
  check_like(op, "rng_state", *rng_state, input, {2}, at::kLong);
  TORCH_CHECK_VALUE(rng_state->is_contiguous(), op, ": rng_state must be contiguous.");
  p.dropout_p = dropout_p;
  p.rng_state = rng_state->data_ptr<int64_t>();
}

// --- Forward ---------------------------------------------------------------------------------------------------------

struct Statistics {
  Tensor mean, rstd;
};

// Runs the kernel, `p` holding what is normalised and where the result goes; `x` has its shape and dtype.
Statistics run_forward(const char* op, LayerNormParams& p, const Tensor& x, const Shape& shape,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms) {
  const at::ScalarType dtype = statistics_dtype(x.scalar_type());
  const at::TensorOptions options = x.options().dtype(dtype);
  TORCH_CHECK_VALUE(!(rms && bias), op, ": RMS norm has no bias.");
  Tensor weights, biases;
  if (weight) weights = parameter(op, "weight", *weight, x, shape.normalized, dtype);
  if (bias) biases = parameter(op, "bias", *bias, x, shape.normalized, dtype);
  if (bias && !weight) weights = at::ones({shape.cols}, options);

  Statistics statistics{rms ? new_empty({0}, options) : new_empty(shape.leading, options),
                        new_empty(shape.leading, options)};
  p.rows = shape.rows;
  p.cols = shape.cols;
  p.rms = rms;
  p.eps = eps;
  p.x_dtype = kernel_dtype(op, x.scalar_type());
  p.weight = weights.defined() ? weights.const_data_ptr() : nullptr;
  p.bias = biases.defined() ? biases.const_data_ptr() : nullptr;
  p.mean = statistics.mean.data_ptr();
  p.rstd = statistics.rstd.data_ptr();
  if (runs_cuda_kernels(x)) {
    run_on_device(op, x, layer_norm_fwd_cuda, p);
  } else {
    FASTATTN_CPU_DISPATCH(layer_norm_fwd_cpu, p);
  }
  return statistics;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, int64_t normalized_dims, double eps,
                                              bool rms) {
  const char* op = rms ? "rms_norm" : "layer_norm";
  check_input(op, input, normalized_dims);
  const Shape shape(input, normalized_dims);
  const Rows x(input, shape);
  Tensor out = empty_output(input, input.scalar_type());
  LayerNormParams p;
  p.x = x.view;
  p.out = output_rows(out, shape);
  p.out_dtype = kernel_dtype(op, out.scalar_type());
  auto [mean, rstd] = run_forward(op, p, input, shape, weight, bias, eps, rms);
  return {std::move(out), std::move(mean), std::move(rstd)};
}

void check_pair(const char* op, at::ScalarType input, at::ScalarType residual) {
  const bool half = input == at::kBFloat16 || input == at::kHalf;
  TORCH_CHECK_NOT_IMPLEMENTED(
      input == residual || (half && residual == at::kFloat), op,
      ": the kernels take a residual of the input's dtype, or float32 with a 16-bit input; got input ", input,
      ", residual ", residual, ". Use backend='eager'.");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const OptionalTensor& rng_state, double dropout_p,
                                                          int64_t normalized_dims, double eps, bool rms) {
  const char* op = rms ? "add_rms_norm" : "add_layer_norm";
  check_input(op, input, normalized_dims);
  check_pair(op, input.scalar_type(), residual.scalar_type());
  check_like(op, "residual", residual, input, input.sizes(), residual.scalar_type());
  const Shape shape(input, normalized_dims);
  const Rows input_rows(input, shape), residual_rows(residual, shape);
  Tensor out = empty_output(input, input.scalar_type());
  Tensor new_residual = empty_output(input, residual.scalar_type());
  LayerNormParams p;
  fill_dropout(op, p, rng_state, dropout_p, input);
  p.x = output_rows(new_residual, shape);
  p.out = output_rows(out, shape);
  p.out_dtype = kernel_dtype(op, out.scalar_type());
  p.input = input_rows.view;
  p.residual = residual_rows.view;
  auto [mean, rstd] = run_forward(op, p, new_residual, shape, weight, bias, eps, rms);
  return {std::move(out), std::move(new_residual), std::move(mean), std::move(rstd)};
}

// --- Backward --------------------------------------------------------------------------------------------------------

// How many rows' shares of dweight and dbias are added into one partial sum: a function of the shape alone, so that the
// order of the sums is too. Few enough blocks that the partial sums cost little beside the rows and leave the caches to
// them, enough to share out; a multiple of the rows that the kernel takes at once.
int64_t rows_per_block(const Shape& shape) {
  constexpr int64_t kElements = 49152, kGroup = 4;
  const int64_t worthwhile = std::clamp<int64_t>(kElements / std::max<int64_t>(shape.cols, 1), kGroup, 64);
  const int64_t rows = std::max((shape.rows + kMaxBwdBlocks - 1) / kMaxBwdBlocks, worthwhile);
  return (rows + kGroup - 1) / kGroup * kGroup;
}

void run_backward_cpu(LayerNormBwdParams& p, const Shape& shape, const at::TensorOptions& options) {
  p.rows_per_block = rows_per_block(shape);
  Tensor partial;
  if (p.dweight != nullptr || p.dbias != nullptr) {
    partial = new_empty({(shape.rows + p.rows_per_block - 1) / p.rows_per_block, 4, shape.cols}, options);
    p.partial = partial.data_ptr();
  }
  FASTATTN_CPU_DISPATCH(layer_norm_bwd_cpu, p);
}

struct ParamGradients {
  Tensor dweight, dbias;
};

Tensor in_dtype(Tensor tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? std::move(tensor) : tensor.to(dtype);
}

// Runs the kernel, `p` holding where dx (and dinput) go; `x` is what was normalised.
ParamGradients run_backward(const char* op, LayerNormBwdParams& p, const Tensor& dout, const Tensor& x,
                            const Shape& shape, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                            bool rms, bool need_dweight, bool need_dbias, std::optional<at::ScalarType> bias_dtype) {
  const at::ScalarType dtype = statistics_dtype(x.scalar_type());
  const at::TensorOptions options = x.options().dtype(dtype);
  TORCH_CHECK_VALUE(weight.has_value() || !need_dweight, op, ": dweight needs a weight.");
  TORCH_CHECK_VALUE(bias_dtype.has_value() || !need_dbias, op, ": dbias needs bias_dtype.");
  check_like(op, "rstd", rstd, x, shape.leading, dtype);
  if (!rms) check_like(op, "mean", mean, x, shape.leading, dtype);
  const Tensor weights =
      weight ? parameter(op, "weight", *weight, x, shape.normalized, dtype) : at::ones({shape.cols}, options);
  const Tensor row_mean = mean.contiguous(), row_rstd = rstd.contiguous();
  const Rows dout_rows(dout, shape), x_rows(x, shape);

  p.rows = shape.rows;
  p.cols = shape.cols;
  p.rms = rms;
  p.x_dtype = kernel_dtype(op, x.scalar_type());
  p.x = x_rows.view;
  p.out_dtype = kernel_dtype(op, dout.scalar_type());
  p.dout = dout_rows.view;
  p.weight = weights.const_data_ptr();
  p.mean = row_mean.const_data_ptr();
  p.rstd = row_rstd.const_data_ptr();

  constexpr int64_t kNothing = 0;
  const at::IntArrayRef none(kNothing);
  ParamGradients gradients{new_empty(need_dweight ? shape.normalized : none, options),
                           new_empty(need_dbias ? shape.normalized : none, options)};
  p.dweight = need_dweight ? gradients.dweight.data_ptr() : nullptr;
  p.dbias = need_dbias ? gradients.dbias.data_ptr() : nullptr;
  if (runs_cuda_kernels(x)) {
    run_on_device(op, x, layer_norm_bwd_cuda, p, layer_norm_bwd_cuda_workspace_bytes);
  } else {
    run_backward_cpu(p, shape, options);
  }
  return {in_dtype(std::move(gradients.dweight), weight ? weight->scalar_type() : dtype),
          in_dtype(std::move(gradients.dbias), bias_dtype.value_or(dtype))};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dout, const Tensor& input, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight,
                                                       int64_t normalized_dims, bool rms, bool need_dweight,
                                                       bool need_dbias, std::optional<at::ScalarType> bias_dtype) {
  const char* op = rms ? "rms_norm_backward" : "layer_norm_backward";
  check_input(op, input, normalized_dims);
  const Shape shape(input, normalized_dims);
  check_like(op, "dout", dout, input, input.sizes(), input.scalar_type());
  Tensor dinput = empty_output(input, input.scalar_type());
  LayerNormBwdParams p;
  p.dx = output_rows(dinput, shape);
  auto [dweight, dbias] =
      run_backward(op, p, dout, input, shape, mean, rstd, weight, rms, need_dweight, need_dbias, bias_dtype);
  return {std::move(dinput), std::move(dweight), std::move(dbias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dout, const OptionalTensor& dnew_residual, const Tensor& new_residual, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& rng_state, double dropout_p,
    int64_t normalized_dims, bool rms, bool need_dweight, bool need_dbias, std::optional<at::ScalarType> bias_dtype,
    at::ScalarType input_dtype) {
  const char* op = rms ? "add_rms_norm_backward" : "add_layer_norm_backward";
  check_input(op, new_residual, normalized_dims);
  const Shape shape(new_residual, normalized_dims);
  check_pair(op, input_dtype, new_residual.scalar_type());
  check_like(op, "dout", dout, new_residual, new_residual.sizes(), input_dtype);
  LayerNormBwdParams p;
  fill_dropout(op, p, rng_state, dropout_p, new_residual);
  std::optional<Rows> dnew_residual_rows;
  if (dnew_residual) {
    check_like(op, "dnew_residual", *dnew_residual, new_residual, new_residual.sizes(), new_residual.scalar_type());
    p.dnew_residual = dnew_residual_rows.emplace(*dnew_residual, shape).view;
  }
  Tensor dresidual = empty_output(new_residual, new_residual.scalar_type());
  p.dx = output_rows(dresidual, shape);
  const bool same = dropout_p == 0.0 && input_dtype == new_residual.scalar_type();
  Tensor dinput = same ? new_empty({0}, dout.options()) : empty_output(dout, input_dtype);
  if (!same) p.dinput = output_rows(dinput, shape);
  auto [dweight, dbias] =
      run_backward(op, p, dout, new_residual, shape, mean, rstd, weight, rms, need_dweight, need_dbias, bias_dtype);
  return {std::move(dinput), std::move(dresidual), std::move(dweight), std::move(dbias)};
}

void register_ops(torch::Library& m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_layer_norm_backward", add_layer_norm_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastattn, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { register_ops(m); }

}  // namespace fastattn
