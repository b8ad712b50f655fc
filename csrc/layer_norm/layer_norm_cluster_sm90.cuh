// Layer norm and RMS norm on Hopper of rows that outgrow a block, forward and backward; layer_norm_fwd.cuh and
// layer_norm_bwd.cuh have the formulas and the work of a block.
// Work:    the blocks of a cluster share a row (row_cluster_sm90.cuh). Forward: a cluster for each row. Backward: as
//          many clusters as fit on the device go through the rows.
// Memory:  every block keeps its share in registers: x is read once, x and dout are, as in shorter rows.
// Numbers: fp32. Each block finds the moments of its share about the share's own mean; those are combined as in Chan,
//          Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). So
//          the blocks meet once a row, not once for the mean and once for the variance.
#pragma once

#include "layer_norm/layer_norm_bwd.cuh"
#include "layer_norm/layer_norm_fwd.cuh"
#include "layer_norm/row_cluster_sm90.cuh"

namespace fastattn {

// --- Forward ---------------------------------------------------------------------------------------------------------

// The moments of a row from those of its shares.
template <int kChunk, int kSums>
struct ShareMoments {
  const LayerNormParams& p;
  const RankSums<kSums>& sums;  // center, deviations, squares
  int blocks, chunks_per_block;

  FASTATTN_DEVICE float count(int rank) const {
    const Columns share = cluster_columns<kChunk>(p.cols, chunks_per_block, static_cast<uint32_t>(rank));
    return static_cast<float>(share.end - share.begin);
  }

  FASTATTN_DEVICE RowStatistics combine() const {
    const float inverse_n = 1.0f / static_cast<float>(p.cols);
    float center = 0.0f, correction = 0.0f, squares = 0.0f;
    if (p.rms) {
      for (int rank = 0; rank < blocks; ++rank) squares += sums[rank][2];
      return statistics_of(p, 0.0f, 0.0f, squares * inverse_n);
    }
    for (int rank = 0; rank < blocks; ++rank) center += sums[rank][0] * (count(rank) * inverse_n);
    for (int rank = 0; rank < blocks; ++rank) correction += count(rank) * inverse_n * distance(rank, center);
    for (int rank = 0; rank < blocks; ++rank) {
      const float own = sums[rank][1] / count(rank), from_mean = distance(rank, center) - correction;
      squares += sums[rank][2] - own * sums[rank][1] + count(rank) * from_mean * from_mean;
    }
    return statistics_of(p, center, correction, squares * inverse_n);
  }

 private:
  // From `center` to the mean of a share.
  FASTATTN_DEVICE float distance(int rank, float center) const {
    return sums[rank][0] - center + sums[rank][1] / count(rank);
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads, Traits::Shape::kBlocksPerMultiprocessor)
    layer_norm_fwd_cluster_kernel(const __grid_constant__ LayerNormParams p, bool aligned, int chunks_per_block) {
  static_assert(Traits::kCached && Traits::Shape::kRowsPerBlock == 1);
  FASTATTN_SHARED(scratch, typename Traits::Scratch);
  FASTATTN_SHARED(inbox, ClusterInbox<4>);
  ClusterExchange<4> exchange(inbox);
  exchange.open();
  const int64_t row_index = blockIdx.x / exchange.blocks();
  const Columns columns = cluster_columns<Traits::kChunk>(p.cols, chunks_per_block, exchange.rank());
  const int thread = static_cast<int>(threadIdx.x);
  FwdRow<Traits> row = {p, row_index, columns, thread, aligned, {p.dropout_p, p.rng_state}, {}};
  row.load();
  const Moments share = sum_moments(row, columns.end - columns.begin, scratch);
  exchange.connect();
  const float sums[4] = {share.center, share.deviations, share.squares, 0.0f};
  const ShareMoments<Traits::kChunk, 4> moments = {p, exchange.exchange(sums), exchange.blocks(), chunks_per_block};
  const RowStatistics statistics = moments.combine();
  normalize_row(row, statistics);
  if (thread == 0 && exchange.rank() == 0) store_statistics(p, row_index, statistics);
}

template <typename Traits>
const char* launch_layer_norm_fwd_cluster(const LayerNormParams& p, const DeviceLaunch& launch, int blocks) {
  const int64_t chunks = (p.cols + Traits::kChunk - 1) / Traits::kChunk;
  if (p.rows * blocks > INT32_MAX) return "more rows than a grid has clusters";
  return launch_clusters(layer_norm_fwd_cluster_kernel<Traits>, dim3(static_cast<unsigned>(p.rows * blocks)),
                         dim3(static_cast<unsigned>(blocks)), dim3(Traits::Shape::kBlockThreads), 0,
                         static_cast<cudaStream_t>(launch.stream), p, forward_is_aligned<Traits>(p),
                         static_cast<int>((chunks + blocks - 1) / blocks));
}

// --- Backward --------------------------------------------------------------------------------------------------------

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads, Traits::Shape::kBlocksPerMultiprocessor)
    layer_norm_bwd_cluster_kernel(const __grid_constant__ LayerNormBwdParams p, bool aligned, int chunks_per_block) {
  static_assert(Traits::Shape::kRowsPerBlock == 1);
  FASTATTN_SHARED(scratch, typename BwdBlock<Traits>::Scratch);
  FASTATTN_SHARED(inbox, ClusterInbox<2>);
  ClusterExchange<2> exchange(inbox);
  exchange.open();
  // Rows of such a length can be counted in 32 bits, which a thread's registers are short of.
  const int rows = static_cast<int>(p.rows), clusters = static_cast<int>(gridDim.x) / exchange.blocks();
  const int cluster = static_cast<int>(blockIdx.x) / exchange.blocks();
  const Columns columns = cluster_columns<Traits::kChunk>(p.cols, chunks_per_block, exchange.rank());
  const int thread = static_cast<int>(threadIdx.x);
  BwdBlock<Traits> block = {p, columns, aligned, thread, {p.dropout_p, p.rng_state}, {}, {}};
  const auto finish_row = [&](const BwdRow<Traits>& row, int row_index) {
    float share[2], sums[2] = {};
    block.sum_row(row, share, scratch);
    const auto& shares = exchange.exchange(share);
    for (int rank = 0; rank < exchange.blocks(); ++rank) {
      sums[0] += shares[rank][0];
      sums[1] += shares[rank][1];
    }
    block.finish_row(row, row_index, {p, row.moments, sums[0], sums[1]});
  };
  BwdRow<Traits> row(p, cluster, columns, thread, aligned);
  exchange.connect();
  for (int row_index = cluster; row_index < rows; row_index += clusters) {
    if constexpr (Traits::kPrefetches) {
      const BwdRow<Traits> next(p, row_index + clusters, columns, thread, aligned);
      finish_row(row, row_index);
      row = next;
    } else {
      finish_row(row, row_index);
      row = BwdRow<Traits>(p, row_index + clusters, columns, thread, aligned);
    }
  }
  if (p.partial == nullptr) return;
  float* const sums_gmem = partial_sums(p, cluster);
  block.store_sums(sums_gmem, block.dweight, nullptr);
  block.store_sums(sums_gmem + p.cols, block.dbias, nullptr);
}

// `most_clusters` leave their sums in the workspace; fewer run where fewer fit on the device at once, since those that
// came later would double the time. Leaves in `clusters` how many ran.
template <typename Traits>
const char* launch_layer_norm_bwd_cluster(const LayerNormBwdParams& p, const DeviceLaunch& launch, int blocks,
                                          int most_clusters, int& clusters) {
  constexpr auto* kKernel = layer_norm_bwd_cluster_kernel<Traits>;
  const int64_t chunks = (p.cols + Traits::kChunk - 1) / Traits::kChunk;
  const dim3 block(Traits::Shape::kBlockThreads), cluster(static_cast<unsigned>(blocks));
  const int resident = max_resident_clusters(kKernel, cluster, block, 0, most_clusters);
  clusters = resident < most_clusters ? resident : most_clusters;
  return launch_clusters(kKernel, dim3(static_cast<unsigned>(clusters * blocks)), cluster, block, 0,
                         static_cast<cudaStream_t>(launch.stream), p, backward_is_aligned<Traits>(p),
                         static_cast<int>((chunks + blocks - 1) / blocks));
}

}  // namespace fastattn
