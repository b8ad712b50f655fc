// Backward layer norm and RMS norm, alone and before a residual addition.
//   d   = x - mean (rms: x)           dweight = sum over rows of dout * rstd * d,    dbias = sum over rows of dout
//   dx  = rstd * (dout * weight - mean(dout * weight) - rstd^2 * d * mean(dout * weight * d))     (rms: no second term)
// Work:    as many blocks as fit on the device at once go through the rows; threads share a row as in the forward. Each
//          block leaves one partial sum of dweight and dbias; layer_norm_sum_partials_kernel adds those up.
// Memory:  x and dout are read once, the next row's while this one is worked on; dx is written once. Sums over rows
//          stay in registers until the block's last row. Longer rows: layer_norm_cluster_sm90.cuh on Hopper, else
//          layer_norm_bwd_long.cuh.
// Numbers: fp32, every sum in a fixed order: the same bits on every run on one kind of device.
#pragma once

#include "layer_norm/layer_norm.cuh"

namespace fastattn {

template <typename Element_, typename OutElement_, typename Shape_, bool kDrops_>
struct LayerNormBwdTraits {
  using Element = Element_;        // of x, dx, dnew_residual
  using OutElement = OutElement_;  // of dout, dinput
  using Shape = Shape_;
  static constexpr bool kDrops = kDrops_;
  static constexpr int kChunk = kChunkOf<Element, OutElement>;
  using Dropout = RowDropout<kDrops>;
  // The draws of a dropout take the registers that the next row would need.
  static constexpr bool kPrefetches = !kDrops;
  // Columns that threads hold sums of, and the shared memory in which the rows of one block add theirs up.
  static constexpr int kColumns = Shape::kThreads * Shape::kChunks * kChunk;
  static constexpr int kSmemBytes =
      Shape::kRowsPerBlock > 1 ? Shape::kRowsPerBlock * kColumns * static_cast<int>(sizeof(float)) : 0;
};

// --- One row, by its formulas ----------------------------------------------------------------------------------------

struct RowMoments {
  float mean, rstd;

  FASTATTN_DEVICE RowMoments(const LayerNormBwdParams& p, int64_t row)
      : mean(p.rms ? 0.0f : static_cast<const float*>(p.mean)[row]), rstd(static_cast<const float*>(p.rstd)[row]) {
    // A row of one element is its own mean, whatever it is: gradients are 0, not a difference scaled by eps^-1/2.
    if (!p.rms && p.cols == 1) rstd = 0.0f;
  }
};

// dx = rstd * (dout * weight - dy_mean) - d_scale * d, from the sums of dy = dout * weight and of dy * d.
struct NormRowTerms {
  float dy_mean, d_scale;

  FASTATTN_DEVICE NormRowTerms(const LayerNormBwdParams& p, const RowMoments& moments, float sum_dy, float sum_dy_d) {
    const float inverse_n = 1.0f / static_cast<float>(p.cols);
    dy_mean = p.rms ? 0.0f : sum_dy * inverse_n;
    d_scale = sum_dy_d * inverse_n * moments.rstd * moments.rstd * moments.rstd;
  }
};

// Writes dx of a chunk: the gradient that came through the norm, and the one that reached x from elsewhere.
template <typename Traits>
FASTATTN_DEVICE void store_gradient(const LayerNormBwdParams& p, Floats<Traits::kChunk> gradient, int64_t row,
                                    int column, int cols, bool aligned) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  if (p.dnew_residual.data != nullptr) {
    const auto* others = row_pointer<const Element>(p.dnew_residual, row);
    const auto other = load_chunk<Traits::kChunk>(others, column, cols, aligned);
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) gradient[i] += to_float(other[i]);
  }
  const auto dx = from_floats<Element>(gradient);
  store_chunk(row_pointer<Element>(p.dx, row), dx, column, cols, aligned);
  if (!Traits::kDrops && p.dinput.data != nullptr) {
    const auto dinput = from_floats<OutElement>(to_floats(dx));
    store_chunk(row_pointer<OutElement>(p.dinput, row), dinput, column, cols, aligned);
  }
}

// Writes dinput of the chunks from `column` on, every `step` columns: what the dropout lets through of dx, which this
// thread has written. In a loop of its own, because the draws need the registers that the row had.
template <typename Traits>
FASTATTN_DEVICE void drop_gradient(const LayerNormBwdParams& p, const RowDropout<Traits::kDrops>& dropout, int64_t row,
                                   int column, int step, int cols, bool aligned) {
  const auto* dx = row_pointer<const typename Traits::Element>(p.dx, row);
  auto* dinput = row_pointer<typename Traits::OutElement>(p.dinput, row);
#pragma unroll 1
  for (; column < cols; column += step) {
    Floats<Traits::kChunk> passed = to_floats(load_chunk<Traits::kChunk>(dx, column, cols, aligned));
    dropout.apply(passed, row, column);
    store_chunk(dinput, from_floats<typename Traits::OutElement>(passed), column, cols, aligned);
  }
}

// Where a block, or a cluster, leaves its sums: dweight's columns, then dbias's.
FASTATTN_DEVICE float* partial_sums(const LayerNormBwdParams& p, int64_t index) {
  return static_cast<float*>(p.partial) + index * 2 * p.cols;
}

// --- Rows in registers -----------------------------------------------------------------------------------------------

// What a thread knows of one row; all zeros beyond the last row, so that it adds nothing to any sum.
template <typename Traits>
struct BwdRow {
  Vec<typename Traits::Element, Traits::kChunk> x[Traits::Shape::kChunks];
  Vec<typename Traits::OutElement, Traits::kChunk> dout[Traits::Shape::kChunks];
  RowMoments moments;

  FASTATTN_DEVICE BwdRow(const LayerNormBwdParams& p, int64_t row, const Columns& columns, int thread, bool aligned)
      : moments(p, row < p.rows ? row : 0) {
    const int end = row < p.rows ? columns.end : 0;
    const auto* x_gmem = row_pointer<const typename Traits::Element>(p.x, row < p.rows ? row : 0);
    const auto* dout_gmem = row_pointer<const typename Traits::OutElement>(p.dout, row < p.rows ? row : 0);
#pragma unroll
    for (int i = 0; i < Traits::Shape::kChunks; ++i) {
      const int column = columns.begin + (i * Traits::Shape::kThreads + thread) * Traits::kChunk;
      x[i] = load_chunk<Traits::kChunk>(x_gmem, column, end, aligned);
      dout[i] = load_chunk<Traits::kChunk>(dout_gmem, column, end, aligned);
    }
  }
};

template <typename Traits>
struct BwdBlock {
  using Shape = typename Traits::Shape;
  static constexpr int kChunk = Traits::kChunk;
  static constexpr int kChunks = Shape::kChunks;
  using Scratch = SumScratch<Shape::kWarpsPerRow, 2>;

  const LayerNormBwdParams& p;
  Columns columns;
  bool aligned;
  int thread;  // among those of a row
  typename Traits::Dropout dropout;
  Floats<kChunk> dweight[kChunks], dbias[kChunks];  // of all rows so far

  FASTATTN_DEVICE int column_of(int i) const { return columns.begin + (i * Shape::kThreads + thread) * kChunk; }

  FASTATTN_DEVICE Floats<kChunk> load_weight(int i) const {
    return load_floats<kChunk>(static_cast<const float*>(p.weight), column_of(i), columns.end, aligned);
  }

  // Of dy = dout * weight and of dy * d, over the block's columns.
  FASTATTN_DEVICE void sum_row(const BwdRow<Traits>& row, float (&sums)[2], Scratch& scratch) const {
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const auto weight = load_weight(chunk);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float dy = to_float(row.dout[chunk][i]) * weight[i];  // 0 past the end
        sums[0] += dy;
        sums[1] += dy * (to_float(row.x[chunk][i]) - row.moments.mean);
      }
    }
    sum_over_row<Shape::kThreads>(sums, scratch);
  }

  FASTATTN_DEVICE NormRowTerms row_terms(const BwdRow<Traits>& row, Scratch& scratch) const {
    float sums[2];
    sum_row(row, sums, scratch);
    return {p, row.moments, sums[0], sums[1]};
  }

  // Writes the gradients of a row, whose share of dweight and dbias joins the sums.
  FASTATTN_DEVICE void finish_row(const BwdRow<Traits>& row, int64_t row_index, const NormRowTerms& terms) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const auto weight = load_weight(chunk);
      Floats<kChunk> gradient;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float d = to_float(row.x[chunk][i]) - row.moments.mean;
        const float dout_rstd = to_float(row.dout[chunk][i]) * row.moments.rstd;
        dweight[chunk][i] += dout_rstd * d;
        dbias[chunk][i] += to_float(row.dout[chunk][i]);
        gradient[i] = dout_rstd * weight[i] - row.moments.rstd * terms.dy_mean - terms.d_scale * d;
      }
      if (row_index < p.rows && column_of(chunk) < columns.end) {
        store_gradient<Traits>(p, gradient, row_index, column_of(chunk), columns.end, aligned);
      }
    }
    if constexpr (Traits::kDrops) {
      if (row_index < p.rows) {
        drop_gradient<Traits>(p, dropout, row_index, column_of(0), Shape::kThreads * kChunk, columns.end, aligned);
      }
    }
  }

  // Writes the sums of one gradient to global memory, those of rows that the block had at the same time added up.
  FASTATTN_DEVICE void store_sums(float* sums_gmem, const Floats<kChunk> (&sums)[kChunks], float* smem) const {
    if constexpr (Shape::kRowsPerBlock == 1) {
      const bool sums_aligned = aligned && p.cols % 4 == 0;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (column_of(i) < columns.end) store_floats(sums_gmem, sums[i], column_of(i), columns.end, sums_aligned);
      }
    } else {
      float* own_smem = smem + static_cast<int>(threadIdx.x) / Shape::kThreads * Traits::kColumns;
      __syncthreads();  // the other gradient's sums were read
#pragma unroll
      for (int i = 0; i < kChunks; ++i) store_floats(own_smem, sums[i], column_of(i), Traits::kColumns, true);
      __syncthreads();
      for (int column = static_cast<int>(threadIdx.x); column < columns.end; column += Shape::kBlockThreads) {
        float total = 0.0f;
#pragma unroll
        for (int row = 0; row < Shape::kRowsPerBlock; ++row) total += smem[row * Traits::kColumns + column];
        sums_gmem[column] = total;
      }
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads, Traits::Shape::kBlocksPerMultiprocessor)
    layer_norm_bwd_kernel(const __grid_constant__ LayerNormBwdParams p, bool aligned) {
  using Shape = typename Traits::Shape;
  FASTATTN_SHARED(scratch, typename BwdBlock<Traits>::Scratch);
  FASTATTN_DYNAMIC_SMEM(smem);
  const int thread = static_cast<int>(threadIdx.x) % Shape::kThreads;
  const int64_t step = int64_t{gridDim.x} * Shape::kRowsPerBlock;
  // Threads beyond the last row go along with their block, whose reductions need them.
  int64_t rows_begin = int64_t{blockIdx.x} * Shape::kRowsPerBlock;
  const int row_in_block = static_cast<int>(threadIdx.x) / Shape::kThreads;
  const Columns columns = {0, static_cast<int>(p.cols)};
  BwdBlock<Traits> block = {p, columns, aligned, thread, {p.dropout_p, p.rng_state}, {}, {}};
  BwdRow<Traits> row(p, rows_begin + row_in_block, columns, thread, aligned);
  while (rows_begin < p.rows) {
    const int64_t row_index = rows_begin + row_in_block;
    rows_begin += step;
    if constexpr (Traits::kPrefetches) {
      const BwdRow<Traits> next(p, rows_begin + row_in_block, columns, thread, aligned);
      block.finish_row(row, row_index, block.row_terms(row, scratch));
      row = next;
    } else {
      block.finish_row(row, row_index, block.row_terms(row, scratch));
      row = BwdRow<Traits>(p, rows_begin + row_in_block, columns, thread, aligned);
    }
  }
  if (p.partial == nullptr) return;
  float* const sums_gmem = partial_sums(p, blockIdx.x);
  block.store_sums(sums_gmem, block.dweight, reinterpret_cast<float*>(smem));
  block.store_sums(sums_gmem + p.cols, block.dbias, reinterpret_cast<float*>(smem));
}

// --- Adding up the blocks --------------------------------------------------------------------------------------------

// A block sums 32 columns of dweight (blockIdx.y = 0) or dbias (1) over all partial sums, each warp a share of those.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    layer_norm_sum_partials_kernel(const __grid_constant__ LayerNormBwdParams p, int partials) {
  FASTATTN_SHARED(sums, float[kWarps][32]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const float* partial = static_cast<const float*>(p.partial) + blockIdx.y * p.cols;
  float sum = 0.0f;
  if (column < p.cols) {
#pragma unroll 4
    for (int i = warp; i < partials; i += kWarps) sum += partial[int64_t{i} * 2 * p.cols + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  float* gradient = static_cast<float*>(blockIdx.y == 0 ? p.dweight : p.dbias);
  if (warp != 0 || column >= p.cols || gradient == nullptr) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums[i][lane];
  gradient[column] = total;
}

inline const char* launch_sum_partials(const LayerNormBwdParams& p, const DeviceLaunch& launch, int partials) {
  constexpr int kWarps = 16;
  const dim3 grid(static_cast<unsigned>((p.cols + 31) / 32), 2);
  return launch_kernel(layer_norm_sum_partials_kernel<kWarps>, grid, dim3(32 * kWarps), 0,
                       static_cast<cudaStream_t>(launch.stream), p, partials);
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// How many blocks share the rows: as many as fit at once, and no more than have a row.
template <typename Shape>
int backward_blocks(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  const int64_t needed = (p.rows + Shape::kRowsPerBlock - 1) / Shape::kRowsPerBlock;
  const int64_t resident = int64_t{launch.multiprocessors} * Shape::kBlocksPerMultiprocessor;
  return static_cast<int>(needed < resident ? needed : resident);
}

template <typename Traits>
bool backward_is_aligned(const LayerNormBwdParams& p) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  constexpr int kChunk = Traits::kChunk;
  return rows_are_aligned<Element>(p.x, kChunk) && rows_are_aligned<OutElement>(p.dout, kChunk) &&
         rows_are_aligned<Element>(p.dnew_residual, kChunk) && rows_are_aligned<Element>(p.dx, kChunk) &&
         rows_are_aligned<OutElement>(p.dinput, kChunk) && is_aligned(p.weight, 16);
}

template <typename Traits>
const char* launch_layer_norm_bwd(const LayerNormBwdParams& p, const DeviceLaunch& launch, int blocks) {
  return launch_kernel(layer_norm_bwd_kernel<Traits>, dim3(static_cast<unsigned>(blocks)),
                       dim3(Traits::Shape::kBlockThreads), Traits::kSmemBytes, static_cast<cudaStream_t>(launch.stream),
                       p, backward_is_aligned<Traits>(p));
}

}  // namespace fastattn
