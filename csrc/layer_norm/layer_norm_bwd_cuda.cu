// Launchers of the backward kernels: which shape serves which number of columns.
#include "layer_norm/layer_norm_bwd.cuh"
#include "layer_norm/layer_norm_bwd_long.cuh"
#include "layer_norm/layer_norm_plan.h"

namespace fastattn {
namespace {

// Rows that a block of the long kernel takes at once.
constexpr int kLongRows = 4;
using LongShape = RowShape<512, 0, 1>;

// fn(the smallest shape whose threads hold the sums of `chunks` chunks), or fn(LongShape).
template <typename Fn>
auto dispatch_bwd_shape(int64_t chunks, Fn&& fn) {
  if (chunks <= 8) return fn(RowShape<8, 1, 4>{});
  if (chunks <= 32) return fn(RowShape<32, 1, 4>{});
  if (chunks <= 64) return fn(RowShape<32, 2, 3>{});
  if (chunks <= 256) return fn(RowShape<128, 2, 3>{});
  if (chunks <= 1024) return fn(RowShape<512, 2, 1>{});
  return fn(LongShape{});
}

template <typename Element, typename OutElement>
int64_t chunks_of(const LayerNormBwdParams& p) {
  constexpr int kChunk = kChunkOf<Element, OutElement>;
  return (p.cols + kChunk - 1) / kChunk;
}

template <typename Shape>
int blocks_of(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  if constexpr (Shape::kChunks > 0) return backward_blocks<Shape>(p, launch);
  LayerNormBwdParams groups = p;
  groups.rows = (p.rows + kLongRows - 1) / kLongRows;
  return backward_blocks<Shape>(groups, launch);
}

bool wants_parameters(const LayerNormBwdParams& p) { return p.dweight != nullptr || p.dbias != nullptr; }

template <typename Element, typename OutElement, bool kDrops>
const char* launch_any_shape(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  const RowClusterPlan plan = plan_bwd_cluster(chunks_of<Element, OutElement>(p), launch);
  if (plan.blocks > 1 && p.rows > 0) {
    int clusters = 0;
    const char* error = layer_norm_bwd_cluster(p, launch, plan, most_bwd_clusters(p, launch, plan), clusters);
    return error == nullptr && p.partial != nullptr ? launch_sum_partials(p, launch, clusters) : error;
  }
  return dispatch_bwd_shape(chunks_of<Element, OutElement>(p), [&](auto shape) -> const char* {
    using Traits = LayerNormBwdTraits<Element, OutElement, decltype(shape), kDrops>;
    const int blocks = blocks_of<decltype(shape)>(p, launch);
    const char* error = nullptr;
    if (blocks > 0) {
      if constexpr (Traits::Shape::kChunks > 0) {
        error = launch_layer_norm_bwd<Traits>(p, launch, blocks);
      } else {
        error = launch_layer_norm_bwd_long<Traits, kLongRows>(p, launch, blocks);
      }
    }
    return error == nullptr && p.partial != nullptr ? launch_sum_partials(p, launch, blocks) : error;
  });
}

}  // namespace

size_t layer_norm_bwd_cuda_workspace_bytes(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  if (!wants_parameters(p)) return 0;
  int blocks = 0;
  dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) -> const char* {
    const int64_t chunks = chunks_of<typename decltype(x)::type, typename decltype(out)::type>(p);
    const RowClusterPlan plan = plan_bwd_cluster(chunks, launch);
    blocks = plan.blocks > 1
                 ? most_bwd_clusters(p, launch, plan)
                 : dispatch_bwd_shape(chunks, [&](auto shape) { return blocks_of<decltype(shape)>(p, launch); });
    return nullptr;
  });
  // Without rows there are no partial sums, but the kernel that adds them up still has to write zeros.
  return sizeof(float) * 2 * static_cast<size_t>(p.cols) * static_cast<size_t>(blocks > 0 ? blocks : 1);
}

const char* layer_norm_bwd_cuda(const LayerNormBwdParams& given, const DeviceLaunch& launch) {
  if (given.cols == 0) return nullptr;
  if (given.cols > kMaxCudaCols) return "rows are too long for the CUDA kernels";
  LayerNormBwdParams p = given;
  p.partial = wants_parameters(p) ? launch.workspace : nullptr;
  return dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    return p.dropout_p > 0.0 ? launch_any_shape<Element, OutElement, true>(p, launch)
                             : launch_any_shape<Element, OutElement, false>(p, launch);
  });
}

}  // namespace fastattn
