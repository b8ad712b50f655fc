// The C face of the INT8 kernels for tests: every tile and split by name, any strides.
#include "int8_matmul/int8_matmul_plan.h"

using namespace fastattn;

struct Int8Call {
  int rows, columns, depth, stride_a, stride_b;
  int a_dtype, bias_dtype, out_dtype, activation;
  int tile, splits, multiprocessors;
};

static Int8Plan plan_of(const Int8Call& call) {
  Int8Plan plan{static_cast<Int8Tile>(call.tile), 1, call.depth};
  const auto look_up = [&](const auto& tiles) {
    for (const Int8TileFacts& facts : tiles) {
      if (facts.tile == plan.tile) plan = int8_split(facts, call.depth, call.splits);
    }
  };
  look_up(kInt8Tiles);
  look_up(kInt8HopperTiles);
  return plan;
}

extern "C" const char* int8_quantize(const void* input, int8_t* q, float* scale, int rows, int depth, int stride_input,
                                     int stride_q, int dtype, void* stream) {
  QuantizeInt8Params p;
  p.rows = rows;
  p.depth = depth;
  p.dtype = static_cast<DType>(dtype);
  p.input = input;
  p.stride_input = stride_input;
  p.q = q;
  p.stride_q = stride_q;
  p.scale = scale;
  DeviceLaunch launch;
  launch.stream = stream;
  return quantize_int8_cuda(p, launch);
}

// workspace_bytes comes back as what the call needs; with less, nothing runs.
extern "C" const char* int8_multiply(const void* a, const float* a_scale, const int8_t* b, const float* b_scale,
                                     const void* bias, void* out, void* workspace, int64_t* workspace_bytes,
                                     const Int8Call* call, void* stream) {
  Int8MatmulParams p;
  p.rows = call->rows;
  p.columns = call->columns;
  p.depth = call->depth;
  p.a_dtype = static_cast<DType>(call->a_dtype);
  p.a = a;
  p.stride_a = call->stride_a;
  p.a_scale = a_scale;
  p.b = b;
  p.stride_b = call->stride_b;
  p.b_scale = b_scale;
  p.bias = bias;
  p.bias_dtype = static_cast<DType>(call->bias_dtype);
  p.activation = static_cast<Activation>(call->activation);
  p.out = out;
  p.out_dtype = static_cast<DType>(call->out_dtype);
  const Int8Plan plan = plan_of(*call);
  const int64_t given = *workspace_bytes;
  *workspace_bytes = static_cast<int64_t>(int8_matmul_cuda_workspace_bytes(p, plan));
  if (given < *workspace_bytes) return nullptr;
  DeviceLaunch launch;
  launch.stream = stream;
  launch.workspace = workspace;
  launch.multiprocessors = call->multiprocessors;
  return int8_matmul_cuda(p, plan, launch);
}

// (tile, splits) that shapes are given on a card.
extern "C" const char* int8_plan(int rows, int columns, int depth, int multiprocessors, int compute_capability,
                                 int* tile_and_splits, void*) {
  DeviceLaunch launch;
  launch.multiprocessors = multiprocessors;
  launch.compute_capability = compute_capability;
  const Int8Plan plan = plan_int8_matmul(rows, columns, depth, launch);
  tile_and_splits[0] = static_cast<int>(plan.tile);
  tile_and_splits[1] = plan.splits;
  return nullptr;
}
