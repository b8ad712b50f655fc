// Which rows a cluster shares on compute capability 9.0: the host's part, without CUDA headers.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "layer_norm/layer_norm.h"

namespace fastattn {

// Chunks (16 bytes of the widest tensor) that a block keeps in registers. Forward: 512 threads with 64 registers, so
// two blocks fit on a multiprocessor and one loads while the other one reduces; a block alone that held more would have
// the multiprocessor to itself. Backward: a thread holds x, dout, the next row's and the sums of dweight and dbias.
constexpr int kFwdShareThreads = 512, kFwdShareChunks = 2048, kFwdLongShareChunks = 4096;
constexpr int kBwdShareThreads = 512, kBwdShareChunks = 1024;

struct RowClusterPlan {
  int blocks = 1;  // 1: no cluster
  bool long_shares = false;
};

// The smallest cluster whose blocks hold a row of `chunks`, if it is longer than one block's share.
constexpr int row_cluster_blocks(int64_t chunks, int64_t share) {
  for (int blocks = 1; blocks <= 8; blocks *= 2) {
    if (chunks <= blocks * share) return blocks;
  }
  return 1;
}

constexpr RowClusterPlan plan_fwd_cluster(int64_t chunks, const DeviceLaunch& launch) {
  if (launch.compute_capability != 90 || chunks <= kFwdShareChunks) return {};
  const int blocks = row_cluster_blocks(chunks, kFwdShareChunks);
  if (blocks > 1) return {blocks, false};
  return {row_cluster_blocks(chunks, kFwdLongShareChunks), true};
}

constexpr RowClusterPlan plan_bwd_cluster(int64_t chunks, const DeviceLaunch& launch) {
  if (launch.compute_capability != 90) return {};
  return {row_cluster_blocks(chunks, kBwdShareChunks), false};
}

// How many clusters share the rows in backward, at most.
constexpr int most_bwd_clusters(const LayerNormBwdParams& p, const DeviceLaunch& launch, const RowClusterPlan& plan) {
  const int fit = launch.multiprocessors / plan.blocks;
  return static_cast<int>(p.rows < fit ? p.rows : fit > 0 ? fit : 1);
}

const char* layer_norm_fwd_cluster(const LayerNormParams& p, const DeviceLaunch& launch, const RowClusterPlan& plan);
// Leaves the sums of dweight and dbias of `clusters` groups of rows, at most `most_clusters`, in p.partial.
const char* layer_norm_bwd_cluster(const LayerNormBwdParams& p, const DeviceLaunch& launch, const RowClusterPlan& plan,
                                   int most_clusters, int& clusters);

}  // namespace fastattn
