// Launcher of the forward kernels: which shape serves which number of columns.
#include "layer_norm/layer_norm_fwd.cuh"
#include "layer_norm/layer_norm_plan.h"

namespace fastattn {
namespace {

// fn(the smallest shape whose threads keep a row of `chunks` chunks in registers).
template <typename Fn>
const char* dispatch_fwd_shape(int64_t chunks, Fn&& fn) {
  if (chunks <= 8) return fn(RowShape<8, 1>{});
  if (chunks <= 32) return fn(RowShape<32, 1>{});
  if (chunks <= 128) return fn(RowShape<32, 4>{});
  if (chunks <= 512) return fn(RowShape<128, 4>{});
  if (chunks <= 2048) return fn(RowShape<512, 4>{});
  if (chunks <= 4096) return fn(RowShape<1024, 4>{});
  return fn(RowShape<1024, 0>{});
}

template <typename Element, typename OutElement, bool kDrops>
const char* launch_any_shape(const LayerNormParams& p, const DeviceLaunch& launch) {
  constexpr int kChunk = kChunkOf<Element, OutElement>;
  const int64_t chunks = (p.cols + kChunk - 1) / kChunk;
  const RowClusterPlan plan = plan_fwd_cluster(chunks, launch);
  if (plan.blocks > 1) return layer_norm_fwd_cluster(p, launch, plan);
  return dispatch_fwd_shape(chunks, [&](auto shape) {
    return launch_layer_norm_fwd<LayerNormFwdTraits<Element, OutElement, decltype(shape), kDrops>>(p, launch);
  });
}

}  // namespace

const char* layer_norm_fwd_cuda(const LayerNormParams& p, const DeviceLaunch& launch) {
  if (p.rows == 0) return nullptr;
  if (p.cols > kMaxCudaCols) return "rows are too long for the CUDA kernels";
  return dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    return p.dropout_p > 0.0 ? launch_any_shape<Element, OutElement, true>(p, launch)
                             : launch_any_shape<Element, OutElement, false>(p, launch);
  });
}

}  // namespace fastattn
