// Launchers of the cluster kernels: called for rows that layer_norm_plan.h gives to a cluster.
#include "layer_norm/layer_norm_cluster_sm90.cuh"
#include "layer_norm/layer_norm_plan.h"

namespace fastattn {
namespace {

// fn(tags of x's and out's elements, whether to drop).
template <typename Params, typename Fn>
const char* dispatch_call(const Params& p, Fn&& fn) {
  return dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) {
    return p.dropout_p > 0.0 ? fn(x, out, std::true_type{}) : fn(x, out, std::false_type{});
  });
}

using FwdShape = RowShape<kFwdShareThreads, kFwdShareChunks / kFwdShareThreads, 2>;
using FwdLongShape = RowShape<1024, kFwdLongShareChunks / 1024, 1>;
using BwdShape = RowShape<kBwdShareThreads, kBwdShareChunks / kBwdShareThreads, 1>;

}  // namespace

const char* layer_norm_fwd_cluster(const LayerNormParams& p, const DeviceLaunch& launch, const RowClusterPlan& plan) {
  return dispatch_call(p, [&](auto x, auto out, auto drops) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    if (plan.long_shares) {
      using Traits = LayerNormFwdTraits<Element, OutElement, FwdLongShape, drops()>;
      return launch_layer_norm_fwd_cluster<Traits>(p, launch, plan.blocks);
    }
    using Traits = LayerNormFwdTraits<Element, OutElement, FwdShape, drops()>;
    return launch_layer_norm_fwd_cluster<Traits>(p, launch, plan.blocks);
  });
}

const char* layer_norm_bwd_cluster(const LayerNormBwdParams& p, const DeviceLaunch& launch, const RowClusterPlan& plan,
                                   int most_clusters, int& clusters) {
  return dispatch_call(p, [&](auto x, auto out, auto drops) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    using Traits = LayerNormBwdTraits<Element, OutElement, BwdShape, drops()>;
    return launch_layer_norm_bwd_cluster<Traits>(p, launch, plan.blocks, most_clusters, clusters);
  });
}

}  // namespace fastattn
