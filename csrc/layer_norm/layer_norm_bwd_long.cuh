// Backward layer norm of rows whose sums of dweight and dbias do not fit in registers; layer_norm_bwd.cuh has the
// formulas.
// Work:    a block takes kRows rows at a time, all its threads share each.
// Memory:  x and dout are read twice, the second time from the L2 cache as a rule: first for the row sums, then for dx.
//          The sums over rows are in the block's part of the workspace, read and written once for kRows rows.
#pragma once

#include "layer_norm/layer_norm_bwd.cuh"

namespace fastattn {

template <typename Traits, int kRows>
struct LongBwdBlock {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  static constexpr int kChunk = Traits::kChunk;
  static constexpr int kThreads = Traits::Shape::kThreads;
  using Scratch = SumScratch<kThreads / 32, 2 * kRows>;

  const LayerNormBwdParams& p;
  int cols;
  bool aligned;
  typename Traits::Dropout dropout;

  // Rows past the last one are the last one again, with its sums; finish_rows leaves them out.
  FASTATTN_DEVICE int64_t clamped(int64_t row) const { return row < p.rows ? row : p.rows - 1; }

  FASTATTN_DEVICE Floats<kChunk> x_chunk(int64_t row, int column) const {
    return to_floats(load_chunk<kChunk>(row_pointer<const Element>(p.x, row), column, cols, aligned));
  }
  FASTATTN_DEVICE Floats<kChunk> dout_chunk(int64_t row, int column) const {
    return to_floats(load_chunk<kChunk>(row_pointer<const OutElement>(p.dout, row), column, cols, aligned));
  }
  FASTATTN_DEVICE Floats<kChunk> weight_chunk(int column) const {
    return load_floats<kChunk>(static_cast<const float*>(p.weight), column, cols, aligned);
  }

  // sums: of dy = dout * weight, then of dy * d, each of kRows rows.
  FASTATTN_DEVICE void sum_rows(int64_t rows_begin, float (&sums)[2 * kRows], Scratch& scratch) const {
    for (int column = static_cast<int>(threadIdx.x) * kChunk; column < cols; column += kThreads * kChunk) {
      const auto weight = weight_chunk(column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = clamped(rows_begin + r);
        const auto x = x_chunk(row, column), dout = dout_chunk(row, column);
        const float mean = RowMoments(p, row).mean;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float dy = dout[i] * weight[i];  // 0 past the end
          sums[r] += dy;
          sums[kRows + r] += dy * (x[i] - mean);
        }
      }
    }
    sum_over_row<kThreads>(sums, scratch);
  }

  FASTATTN_DEVICE void finish_rows(int64_t rows_begin, const float (&sums)[2 * kRows], bool first) const {
    float* dweight_gmem = partial_sums(p, blockIdx.x);
    float* dbias_gmem = dweight_gmem + p.cols;
    const bool sums_aligned = aligned && cols % 4 == 0;
    for (int column = static_cast<int>(threadIdx.x) * kChunk; column < cols; column += kThreads * kChunk) {
      const auto weight = weight_chunk(column);
      Floats<kChunk> dweight = {}, dbias = {};
      if (p.partial != nullptr && !first) {
        dweight = load_floats<kChunk>(dweight_gmem, column, cols, sums_aligned);
        dbias = load_floats<kChunk>(dbias_gmem, column, cols, sums_aligned);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = rows_begin + r;
        if (row >= p.rows) continue;
        const RowMoments moments(p, row);
        const NormRowTerms terms(p, moments, sums[r], sums[kRows + r]);
        const auto x = x_chunk(row, column), dout = dout_chunk(row, column);
        Floats<kChunk> gradient;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float d = x[i] - moments.mean, dout_rstd = dout[i] * moments.rstd;
          dweight[i] += dout_rstd * d;
          dbias[i] += dout[i];
          gradient[i] = dout_rstd * weight[i] - moments.rstd * terms.dy_mean - terms.d_scale * d;
        }
        store_gradient<Traits>(p, gradient, row, column, cols, aligned);
      }
      if (p.partial != nullptr) {
        store_floats(dweight_gmem, dweight, column, cols, sums_aligned);
        store_floats(dbias_gmem, dbias, column, cols, sums_aligned);
      }
    }
    if constexpr (Traits::kDrops) {
      for (int64_t row = rows_begin; row < rows_begin + kRows && row < p.rows; ++row) {
        drop_gradient<Traits>(p, dropout, row, static_cast<int>(threadIdx.x) * kChunk, kThreads * kChunk, cols,
                              aligned);
      }
    }
  }
};

template <typename Traits, int kRows>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads, Traits::Shape::kBlocksPerMultiprocessor)
    layer_norm_bwd_long_kernel(const __grid_constant__ LayerNormBwdParams p, bool aligned) {
  using Block = LongBwdBlock<Traits, kRows>;
  FASTATTN_SHARED(scratch, typename Block::Scratch);
  const Block block = {p, static_cast<int>(p.cols), aligned, {p.dropout_p, p.rng_state}};
  const int64_t first = int64_t{blockIdx.x} * kRows;
  for (int64_t rows_begin = first; rows_begin < p.rows; rows_begin += int64_t{gridDim.x} * kRows) {
    float sums[2 * kRows] = {};
    block.sum_rows(rows_begin, sums, scratch);
    block.finish_rows(rows_begin, sums, rows_begin == first);
  }
}

template <typename Traits, int kRows>
const char* launch_layer_norm_bwd_long(const LayerNormBwdParams& p, const DeviceLaunch& launch, int blocks) {
  return launch_kernel(layer_norm_bwd_long_kernel<Traits, kRows>, dim3(static_cast<unsigned>(blocks)),
                       dim3(Traits::Shape::kBlockThreads), 0, static_cast<cudaStream_t>(launch.stream), p,
                       backward_is_aligned<Traits>(p));
}

}  // namespace fastattn
