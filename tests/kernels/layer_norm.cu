// The C face of the layer norm kernels for tests: contiguous rows of one dtype, weight and bias.
#include "layer_norm/layer_norm.h"

using namespace fastattn;

struct LayerNormCall {
  int dtype, rows, cols, rms, compute_capability, multiprocessors;
};

extern "C" const char* layer_norm_forward(const LayerNormCall* c, void* x, const float* weight, const float* bias,
                                          void* out, float* mean, float* rstd, void* stream) {
  LayerNormParams p;
  p.rows = c->rows, p.cols = c->cols, p.rms = c->rms != 0, p.eps = 1e-5;
  p.x_dtype = p.out_dtype = static_cast<DType>(c->dtype);
  p.x = {x, c->cols}, p.out = {out, c->cols};
  p.weight = weight, p.bias = bias, p.mean = mean, p.rstd = rstd;
  DeviceLaunch launch;
  launch.stream = stream;
  launch.compute_capability = c->compute_capability, launch.multiprocessors = c->multiprocessors;
  return layer_norm_fwd_cuda(p, launch);
}

extern "C" const char* layer_norm_backward(const LayerNormCall* c, void* x, void* dout, const float* weight,
                                           const float* mean, const float* rstd, void* dx, float* dweight, float* dbias,
                                           void* workspace, int workspace_bytes, void* stream) {
  LayerNormBwdParams p;
  p.rows = c->rows, p.cols = c->cols, p.rms = c->rms != 0;
  p.x_dtype = p.out_dtype = static_cast<DType>(c->dtype);
  p.x = {x, c->cols}, p.dout = {dout, c->cols}, p.dx = {dx, c->cols};
  p.weight = weight, p.mean = mean, p.rstd = rstd, p.dweight = dweight, p.dbias = dbias;
  DeviceLaunch launch;
  launch.stream = stream;
  launch.compute_capability = c->compute_capability, launch.multiprocessors = c->multiprocessors;
  launch.workspace = workspace;
  if (layer_norm_bwd_cuda_workspace_bytes(p, launch) > static_cast<size_t>(workspace_bytes)) return "workspace";
  return layer_norm_bwd_cuda(p, launch);
}
