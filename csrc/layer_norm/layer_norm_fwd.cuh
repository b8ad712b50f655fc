// Forward layer norm and RMS norm, alone and after a residual addition (layer_norm.h has the formulas).
// Work:    a row belongs to 8 to 1024 threads (RowShape), as many as keep it in registers; short rows share a block.
// Memory:  each row is read once and written once, 16 bytes a thread where addresses allow. Rows too long for the
//          registers are read again, once a pass.
// Numbers: fp32. The variance is that of the deviations from the mean, not a difference of large numbers. The mean's
// own
//          rounding is corrected by the mean of the deviations, which a row with a large mean needs.
#pragma once

#include "layer_norm/layer_norm.cuh"

namespace fastattn {

template <typename Element_, typename OutElement_, typename Shape_>
struct LayerNormFwdTraits {
  using Element = Element_;  // of x and the residual
  using OutElement = OutElement_;
  using Shape = Shape_;
  static constexpr int kChunk = kChunkOf<Element, OutElement>;
};

// A thread's part of one row.
template <typename Traits>
struct FwdRow {
  using Shape = typename Traits::Shape;
  using Chunk = Vec<typename Traits::Element, Traits::kChunk>;
  const LayerNormParams& p;
  int64_t row;
  int thread;  // among those of the row
  bool aligned;
  Chunk cache[Shape::kCached ? Shape::kCachedChunks : 1];

  FASTATTN_DEVICE int64_t cols() const { return row < p.rows ? p.cols : 0; }

  // fn(column, chunk of x) for the chunks that this thread owns.
  template <typename Fn>
  FASTATTN_DEVICE void for_each(Fn&& fn) {
    if constexpr (Shape::kCached) {
#pragma unroll
      for (int i = 0; i < Shape::kCachedChunks; ++i) {
        const int64_t column = int64_t{i * Shape::kThreads + thread} * Traits::kChunk;
        if (column < cols()) fn(column, cache[i]);
      }
    } else {
      const auto* x = row_pointer<typename Traits::Element>(p.x, row);
      for (int64_t column = int64_t{thread} * Traits::kChunk; column < cols();
           column += Shape::kThreads * Traits::kChunk) {
        fn(column, load_chunk<Traits::kChunk>(x, column, cols(), aligned));
      }
    }
  }

  // x, or residual + dropout(input), which becomes x.
  FASTATTN_DEVICE void load() {
    const bool adds = p.residual.data != nullptr;
    if constexpr (Shape::kCached) {
#pragma unroll
      for (int i = 0; i < Shape::kCachedChunks; ++i) {
        const int64_t column = int64_t{i * Shape::kThreads + thread} * Traits::kChunk;
        if (column >= cols()) continue;
        cache[i] =
            adds ? add(column)
                 : load_chunk<Traits::kChunk>(row_pointer<typename Traits::Element>(p.x, row), column, cols(), aligned);
      }
    } else if (adds) {
      for (int64_t column = int64_t{thread} * Traits::kChunk; column < cols();
           column += Shape::kThreads * Traits::kChunk) {
        add(column);
      }
    }
  }

  FASTATTN_DEVICE Chunk add(int64_t column) {
    const auto residual =
        load_chunk<Traits::kChunk>(row_pointer<typename Traits::Element>(p.residual, row), column, cols(), aligned);
    const auto input =
        load_chunk<Traits::kChunk>(row_pointer<typename Traits::OutElement>(p.input, row), column, cols(), aligned);
    Floats<Traits::kChunk> added;
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) added[i] = to_float(input[i]);
    if (p.dropout_p > 0.0) RowDropout(p.dropout_p, p.rng_state).apply(added, row, column);
    Chunk sum;
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) {
      sum[i] = from_float<typename Traits::Element>(to_float(residual[i]) + added[i]);
    }
    store_chunk(row_pointer<typename Traits::Element>(p.x, row), sum, column, cols(), aligned);
    return sum;
  }
};

struct RowStatistics {
  float center, correction, rstd;  // the mean is center + correction
};

template <typename Traits>
FASTATTN_DEVICE RowStatistics row_statistics(FwdRow<Traits>& row, RowScratch<typename Traits::Shape>& scratch) {
  using Shape = typename Traits::Shape;
  const float inverse_n = 1.0f / static_cast<float>(row.p.cols);
  float center = 0.0f;
  if (!row.p.rms) {
    float sum[1] = {};
    row.for_each([&](int64_t, const auto& chunk) {
#pragma unroll
      for (int i = 0; i < Traits::kChunk; ++i) sum[0] += to_float(chunk[i]);  // 0 past the end
    });
    sum_over_row<Shape>(sum, scratch);
    center = sum[0] * inverse_n;
  }
  float sums[2] = {};  // of deviations, of their squares
  row.for_each([&](int64_t column, const auto& chunk) {
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) {
      const float deviation = column + i < row.p.cols ? to_float(chunk[i]) - center : 0.0f;
      sums[0] += deviation;
      sums[1] += deviation * deviation;
    }
  });
  sum_over_row<Shape>(sums, scratch);
  const float correction = row.p.rms ? 0.0f : sums[0] * inverse_n;
  const float variance = sums[1] * inverse_n - correction * correction;
  // Rounding may leave an equal row a variance just below 0; a comparison, unlike fmaxf, lets NaN through.
  const float eps = static_cast<float>(row.p.eps);
  return {center, correction, 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

template <typename Traits>
FASTATTN_DEVICE void normalize_row(FwdRow<Traits>& row, const RowStatistics& statistics) {
  const LayerNormParams& p = row.p;
  const auto* weight = static_cast<const float*>(p.weight);
  const auto* bias = static_cast<const float*>(p.bias);
  auto* out = row_pointer<typename Traits::OutElement>(p.out, row.row);
  const float offset = -statistics.correction * statistics.rstd;
  row.for_each([&](int64_t column, const auto& chunk) {
    Floats<Traits::kChunk> values;
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) {
      values[i] = (to_float(chunk[i]) - statistics.center) * statistics.rstd + offset;
    }
    if (weight != nullptr) {
      const auto scale = load_floats<Traits::kChunk>(weight, column, p.cols, row.aligned);
#pragma unroll
      for (int i = 0; i < Traits::kChunk; ++i) values[i] *= scale[i];
    }
    if (bias != nullptr) {
      const auto shift = load_floats<Traits::kChunk>(bias, column, p.cols, row.aligned);
#pragma unroll
      for (int i = 0; i < Traits::kChunk; ++i) values[i] += shift[i];
    }
    Vec<typename Traits::OutElement, Traits::kChunk> result;
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) result[i] = from_float<typename Traits::OutElement>(values[i]);
    store_chunk(out, result, column, p.cols, row.aligned);
  });
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads)
    layer_norm_fwd_kernel(const __grid_constant__ LayerNormParams p, bool aligned) {
  using Shape = typename Traits::Shape;
  FASTATTN_SHARED(scratch, RowScratch<Shape>);
  const int thread = static_cast<int>(threadIdx.x) % Shape::kThreads;
  // Threads beyond the last row go along with it: their warp's reductions need them.
  FwdRow<Traits> row = {p,
                        int64_t{blockIdx.x} * Shape::kRowsPerBlock + static_cast<int>(threadIdx.x) / Shape::kThreads,
                        thread,
                        aligned,
                        {}};
  row.load();
  const RowStatistics statistics = row_statistics(row, scratch);
  normalize_row(row, statistics);
  if (thread == 0 && row.row < p.rows) {
    static_cast<float*>(p.rstd)[row.row] = statistics.rstd;
    if (!p.rms) static_cast<float*>(p.mean)[row.row] = statistics.center + statistics.correction;
  }
}

template <typename Traits>
const char* launch_layer_norm_fwd(const LayerNormParams& p, const DeviceLaunch& launch) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  using Shape = typename Traits::Shape;
  constexpr int kChunk = Traits::kChunk;
  const bool aligned = rows_are_aligned<Element>(p.x, kChunk) && rows_are_aligned<OutElement>(p.out, kChunk) &&
                       rows_are_aligned<OutElement>(p.input, kChunk) && rows_are_aligned<Element>(p.residual, kChunk) &&
                       is_aligned(p.weight, 16) && is_aligned(p.bias, 16);
  const int64_t blocks = (p.rows + Shape::kRowsPerBlock - 1) / Shape::kRowsPerBlock;
  if (blocks > INT32_MAX) return "more rows than a grid has blocks";
  return launch_kernel(layer_norm_fwd_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kBlockThreads),
                       0, static_cast<cudaStream_t>(launch.stream), p, aligned);
}

}  // namespace fastattn
