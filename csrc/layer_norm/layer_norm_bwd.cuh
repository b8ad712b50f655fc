// Backward layer norm and RMS norm, alone and before a residual addition.
//   d   = x - mean (rms: x)           dweight = sum over rows of dout * rstd * d,    dbias = sum over rows of dout
//   dx  = rstd * (dout * weight - mean(dout * weight) - rstd^2 * d * mean(dout * weight * d))     (rms: no second term)
// Work:    a grid of as many blocks as fit on the device at once goes through the rows; threads share a row as in the
//          forward. Each block leaves one partial sum of dweight and dbias, and a second kernel adds those up.
// Memory:  x and dout are read once, dx is written once. Sums over rows stay in registers until the block's last row;
// of
//          rows too long for that, in the block's own part of the workspace.
// Numbers: fp32, every sum in a fixed order: the same bits on every run on one kind of device.
#pragma once

#include "layer_norm/layer_norm.cuh"

namespace fastattn {

template <typename Element_, typename OutElement_, typename Shape_>
struct LayerNormBwdTraits {
  using Element = Element_;        // of x, dx, dnew_residual
  using OutElement = OutElement_;  // of dout, dinput
  using Shape = Shape_;
  static constexpr int kChunk = kChunkOf<Element, OutElement>;
  // Columns that the block's threads hold sums of, and the shared memory in which rows of one block add theirs up.
  static constexpr int kCachedCols = Shape::kThreads * Shape::kCachedChunks * kChunk;
  static constexpr int kSmemBytes =
      Shape::kRowsPerBlock > 1 ? Shape::kRowsPerBlock * kCachedCols * static_cast<int>(sizeof(float)) : 0;
};

// The block's (2, cols) sums of dweight and dbias.
FASTATTN_DEVICE float* block_sums(const LayerNormBwdParams& p) {
  return static_cast<float*>(p.partial) + int64_t{blockIdx.x} * 2 * p.cols;
}

struct RowTerms {
  float mean, rstd;
  float dy_mean, d_scale;  // dx = rstd * (dout * weight - dy_mean) - d_scale * d
};

template <typename Traits>
struct BwdBlock {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  using Shape = typename Traits::Shape;
  static constexpr int kChunk = Traits::kChunk;
  static constexpr int kCachedChunks = Shape::kCached ? Shape::kCachedChunks : 1;

  const LayerNormBwdParams& p;
  bool aligned;
  int thread;  // among those of a row
  Vec<Element, kChunk> x[kCachedChunks];
  Vec<OutElement, kChunk> dout[kCachedChunks];
  Floats<kChunk> dweight[kCachedChunks], dbias[kCachedChunks];

  FASTATTN_DEVICE int64_t column_of(int i) const { return int64_t{i * Shape::kThreads + thread} * kChunk; }

  FASTATTN_DEVICE void load(int64_t row) {
    if constexpr (Shape::kCached) {
#pragma unroll
      for (int i = 0; i < kCachedChunks; ++i) {
        // A row beyond the last one is all zeros: it adds nothing to any sum.
        const int64_t cols = row < p.rows ? p.cols : 0;
        const int64_t at = row < p.rows ? row : 0;
        x[i] = load_chunk<kChunk>(row_pointer<Element>(p.x, at), column_of(i), cols, aligned);
        dout[i] = load_chunk<kChunk>(row_pointer<OutElement>(p.dout, at), column_of(i), cols, aligned);
      }
    }
  }

  // fn(i, column, chunk of x, chunk of dout) for this thread's chunks of a row.
  template <typename Fn>
  FASTATTN_DEVICE void for_each(int64_t row, Fn&& fn) {
    if constexpr (Shape::kCached) {
#pragma unroll
      for (int i = 0; i < kCachedChunks; ++i) {
        if (column_of(i) < p.cols) fn(i, column_of(i), x[i], dout[i]);
      }
    } else {
      for (int64_t column = column_of(0); column < p.cols; column += Shape::kThreads * kChunk) {
        fn(0, column, load_chunk<kChunk>(row_pointer<Element>(p.x, row), column, p.cols, aligned),
           load_chunk<kChunk>(row_pointer<OutElement>(p.dout, row), column, p.cols, aligned));
      }
    }
  }

  FASTATTN_DEVICE Floats<kChunk> load_weight(int64_t column) const {
    return load_floats<kChunk>(static_cast<const float*>(p.weight), column, p.cols, aligned);
  }

  FASTATTN_DEVICE RowTerms row_terms(int64_t row, RowScratch<Shape>& scratch) {
    RowTerms terms = {};
    if (row < p.rows) {
      terms.mean = p.rms ? 0.0f : static_cast<const float*>(p.mean)[row];
      terms.rstd = static_cast<const float*>(p.rstd)[row];
    }
    // A row of one element is its own mean, whatever it is: gradients are 0, not a difference scaled by eps^-1/2.
    if (!p.rms && p.cols == 1) terms.rstd = 0.0f;
    float sums[2] = {};  // of dy = dout * weight and of dy * d
    for_each(row, [&](int, int64_t column, const auto& x_chunk, const auto& dout_chunk) {
      const auto weight = load_weight(column);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float dy = to_float(dout_chunk[i]) * weight[i];  // 0 past the end
        sums[0] += dy;
        sums[1] += dy * (to_float(x_chunk[i]) - terms.mean);
      }
    });
    sum_over_row<Shape>(sums, scratch);
    const float inverse_n = 1.0f / static_cast<float>(p.cols);
    terms.dy_mean = p.rms ? 0.0f : sums[0] * inverse_n;
    terms.d_scale = sums[1] * inverse_n * terms.rstd * terms.rstd * terms.rstd;
    return terms;
  }

  // Writes dx and dinput of a row, whose share of dweight and dbias joins the sums.
  FASTATTN_DEVICE void finish_row(int64_t row, const RowTerms& terms, bool first) {
    for_each(row, [&](int chunk, int64_t column, const auto& x_chunk, const auto& dout_chunk) {
      const auto weight = load_weight(column);
      Floats<kChunk> gradient, dweight_share, dbias_share;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float d = to_float(x_chunk[i]) - terms.mean, dy = to_float(dout_chunk[i]);
        dweight_share[i] = dy * terms.rstd * d;
        dbias_share[i] = dy;
        gradient[i] = terms.rstd * (dy * weight[i] - terms.dy_mean) - terms.d_scale * d;
      }
      if (row < p.rows) store_gradients(row, column, gradient);
      if (p.partial != nullptr) add_shares(chunk, column, dweight_share, dbias_share, first);
    });
  }

  FASTATTN_DEVICE void store_gradients(int64_t row, int64_t column, const Floats<kChunk>& gradient) {
    Vec<Element, kChunk> other{}, dx;
    const bool has_other = p.dnew_residual.data != nullptr;
    if (has_other) other = load_chunk<kChunk>(row_pointer<Element>(p.dnew_residual, row), column, p.cols, aligned);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dx[i] = from_float<Element>(has_other ? gradient[i] + to_float(other[i]) : gradient[i]);
    }
    store_chunk(row_pointer<Element>(p.dx, row), dx, column, p.cols, aligned);
    if (p.dinput.data == nullptr) return;
    Floats<kChunk> passed;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) passed[i] = to_float(dx[i]);
    if (p.dropout_p > 0.0) RowDropout(p.dropout_p, p.rng_state).apply(passed, row, column);
    Vec<OutElement, kChunk> dinput;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) dinput[i] = from_float<OutElement>(passed[i]);
    store_chunk(row_pointer<OutElement>(p.dinput, row), dinput, column, p.cols, aligned);
  }

  FASTATTN_DEVICE void add_shares(int chunk, int64_t column, const Floats<kChunk>& dweight_share,
                                  const Floats<kChunk>& dbias_share, bool first) {
    if constexpr (Shape::kCached) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        dweight[chunk][i] += dweight_share[i];
        dbias[chunk][i] += dbias_share[i];
      }
    } else {
      float* sums = block_sums(p);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (column + i >= p.cols) continue;
        sums[column + i] = first ? dweight_share[i] : sums[column + i] + dweight_share[i];
        sums[p.cols + column + i] = first ? dbias_share[i] : sums[p.cols + column + i] + dbias_share[i];
      }
    }
  }

  // sums = of one gradient, over the rows that the block's threads worked on at the same time.
  FASTATTN_DEVICE void store_sums(float* sums, const Floats<kChunk> (&shares)[kCachedChunks], float* smem) {
    if constexpr (Shape::kRowsPerBlock == 1) {
#pragma unroll
      for (int chunk = 0; chunk < kCachedChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (column_of(chunk) + i < p.cols) sums[column_of(chunk) + i] = shares[chunk][i];
        }
      }
    } else {
      const int own = static_cast<int>(threadIdx.x) / Shape::kThreads;
      __syncthreads();  // the last sums were read
#pragma unroll
      for (int chunk = 0; chunk < kCachedChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) smem[own * Traits::kCachedCols + column_of(chunk) + i] = shares[chunk][i];
      }
      __syncthreads();
      for (int column = static_cast<int>(threadIdx.x); column < p.cols; column += Shape::kBlockThreads) {
        float total = 0.0f;
#pragma unroll
        for (int row = 0; row < Shape::kRowsPerBlock; ++row) total += smem[row * Traits::kCachedCols + column];
        sums[column] = total;
      }
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads)
    layer_norm_bwd_kernel(const __grid_constant__ LayerNormBwdParams p, bool aligned) {
  using Shape = typename Traits::Shape;
  FASTATTN_SHARED(scratch, RowScratch<Shape>);
  FASTATTN_DYNAMIC_SMEM(smem);
  BwdBlock<Traits> block = {p, aligned, static_cast<int>(threadIdx.x) % Shape::kThreads, {}, {}, {}, {}};
  // The rows of one iteration; threads without one go along, their warp's reductions need them.
  const int64_t first_row = int64_t{blockIdx.x} * Shape::kRowsPerBlock;
  for (int64_t rows = first_row; rows < p.rows; rows += int64_t{gridDim.x} * Shape::kRowsPerBlock) {
    const int64_t row = rows + static_cast<int>(threadIdx.x) / Shape::kThreads;
    block.load(row);
    const RowTerms terms = block.row_terms(row, scratch);
    block.finish_row(row, terms, rows == first_row);
  }
  if (Shape::kCached && p.partial != nullptr) {
    block.store_sums(block_sums(p), block.dweight, reinterpret_cast<float*>(smem));
    block.store_sums(block_sums(p) + p.cols, block.dbias, reinterpret_cast<float*>(smem));
  }
}

// --- Adding up the blocks --------------------------------------------------------------------------------------------

// One block sums 32 columns of dweight (blockIdx.y == 0) or dbias over all partial sums, each warp a share of them.
constexpr int kSumWarps = 16;

inline __global__ void __launch_bounds__(32 * kSumWarps)
    layer_norm_sum_partials_kernel(const __grid_constant__ LayerNormBwdParams p, int blocks) {
  FASTATTN_SHARED(sums, float[kSumWarps][32]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const float* partial = static_cast<const float*>(p.partial) + blockIdx.y * p.cols;
  float sum = 0.0f;
  if (column < p.cols) {
#pragma unroll 4
    for (int64_t block = warp; block < blocks; block += kSumWarps) sum += partial[block * 2 * p.cols + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  float* gradient = static_cast<float*>(blockIdx.y == 0 ? p.dweight : p.dbias);
  if (warp != 0 || column >= p.cols || gradient == nullptr) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSumWarps; ++i) total += sums[i][lane];
  gradient[column] = total;
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// Blocks that fit on the device at once: 2048 threads a multiprocessor is what registers and the hardware allow at
// best.
template <typename Shape>
int64_t backward_blocks(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  const int64_t needed = (p.rows + Shape::kRowsPerBlock - 1) / Shape::kRowsPerBlock;
  const int64_t resident = int64_t{launch.multiprocessors} * (Shape::kBlockThreads <= 512 ? 2 : 1);
  return needed < resident ? needed : resident;
}

template <typename Traits>
const char* launch_layer_norm_bwd(const LayerNormBwdParams& given, const DeviceLaunch& launch) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  using Shape = typename Traits::Shape;
  constexpr int kChunk = Traits::kChunk;
  LayerNormBwdParams p = given;
  const bool param_grads = p.dweight != nullptr || p.dbias != nullptr;
  p.partial = param_grads ? launch.workspace : nullptr;
  const bool aligned = rows_are_aligned<Element>(p.x, kChunk) && rows_are_aligned<OutElement>(p.dout, kChunk) &&
                       rows_are_aligned<Element>(p.dnew_residual, kChunk) && rows_are_aligned<Element>(p.dx, kChunk) &&
                       rows_are_aligned<OutElement>(p.dinput, kChunk) && is_aligned(p.weight, 16);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const int64_t blocks = backward_blocks<Shape>(p, launch);
  const char* error = nullptr;
  if (blocks > 0) {
    error = launch_kernel(layer_norm_bwd_kernel<Traits>, dim3(static_cast<unsigned>(blocks)),
                          dim3(Shape::kBlockThreads), Traits::kSmemBytes, stream, p, aligned);
  }
  if (error != nullptr || !param_grads) return error;
  const int64_t column_blocks = (p.cols + 31) / 32;
  return launch_kernel(layer_norm_sum_partials_kernel, dim3(static_cast<unsigned>(column_blocks), 2),
                       dim3(32 * kSumWarps), 0, stream, p, static_cast<int>(blocks));
}

}  // namespace fastattn
