// Forward layer norm and RMS norm, alone and after a residual addition (layer_norm.h has the formulas).
// Work:    a row belongs to 8 to 1024 threads (RowShape), as many as keep it in registers; short rows share a block.
// Memory:  each row is read once and written once, 16 bytes a thread where addresses allow. Rows too long for the
//          registers (kChunks = 0) are read again for each pass, from the L2 cache as a rule; Hopper divides them among
//          the blocks of a cluster instead (layer_norm_cluster_sm90.cuh).
// Numbers: fp32. The variance is that of the deviations from the mean, not a difference of large numbers. The mean's
//          own rounding is corrected by the mean of the deviations, which a row with a large mean needs.
#pragma once

#include "layer_norm/layer_norm.cuh"

namespace fastattn {

template <typename Element_, typename OutElement_, typename Shape_, bool kDrops_>
struct LayerNormFwdTraits {
  using Element = Element_;        // of x and the residual
  using OutElement = OutElement_;  // of out and the input that is added
  using Shape = Shape_;
  static constexpr bool kDrops = kDrops_;
  static constexpr bool kCached = Shape::kChunks > 0;
  static constexpr int kChunk = kChunkOf<Element, OutElement>;
  using Chunk = Vec<Element, kChunk>;
  using Scratch = SumScratch<Shape::kWarpsPerRow, 2>;
};

// A thread's part of one row.
template <typename Traits>
struct FwdRow {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  using Shape = typename Traits::Shape;
  using Chunk = typename Traits::Chunk;
  static constexpr int kChunk = Traits::kChunk;

  const LayerNormParams& p;
  int64_t row;
  Columns columns;  // none for threads beyond the last row, which go along because their warp's reductions need them
  int thread;       // among those of the row
  bool aligned;
  RowDropout<Traits::kDrops> dropout;
  Chunk cache[Traits::kCached ? Shape::kChunks : 1];

  FASTATTN_DEVICE int column_of(int i) const { return columns.begin + (i * Shape::kThreads + thread) * kChunk; }

  // fn(column, chunk of x) for the chunks that this thread owns.
  template <typename Fn>
  FASTATTN_DEVICE void for_each(Fn&& fn) const {
    if constexpr (Traits::kCached) {
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        if (column_of(i) < columns.end) fn(column_of(i), cache[i]);
      }
    } else {
      const auto* x = row_pointer<const Element>(p.x, row);
      for (int column = column_of(0); column < columns.end; column += Shape::kThreads * kChunk) {
        fn(column, load_chunk<kChunk>(x, column, columns.end, aligned));
      }
    }
  }

  // Fetches x, or makes it: residual + dropout(input).
  FASTATTN_DEVICE void load() {
    const bool adds = Traits::kDrops || p.residual.data != nullptr;
    if constexpr (Traits::kCached) {
      const auto* x = row_pointer<const Element>(p.x, row);
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        if (column_of(i) < columns.end) {
          cache[i] = adds ? add(column_of(i)) : load_chunk<kChunk>(x, column_of(i), columns.end, aligned);
        }
      }
    } else if (adds) {
      for (int column = column_of(0); column < columns.end; column += Shape::kThreads * kChunk) add(column);
    }
  }

  FASTATTN_DEVICE Chunk add(int column) const {
    const int end = columns.end;
    const auto residual = load_chunk<kChunk>(row_pointer<const Element>(p.residual, row), column, end, aligned);
    const auto input = load_chunk<kChunk>(row_pointer<const OutElement>(p.input, row), column, end, aligned);
    Floats<kChunk> sum = to_floats(input);
    dropout.apply(sum, row, column);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[i] += to_float(residual[i]);
    const Chunk x = from_floats<Element>(sum);
    store_chunk(row_pointer<Element>(p.x, row), x, column, end, aligned);
    return x;
  }
};

struct RowStatistics {
  float center, correction, rstd;  // the mean is center + correction
};

// Sums over the `count` columns of a row that a block has: of deviations from their own mean as rounded, and of
// squares.
struct Moments {
  float center, deviations, squares;
};

template <typename Traits>
FASTATTN_DEVICE Moments sum_moments(const FwdRow<Traits>& row, int64_t count, typename Traits::Scratch& scratch) {
  constexpr int kThreads = Traits::Shape::kThreads;
  const float inverse_n = 1.0f / static_cast<float>(count);
  float center = 0.0f;
  if (!row.p.rms) {
    float sum[1] = {};
    row.for_each([&](int, const auto& chunk) {
#pragma unroll
      for (int i = 0; i < Traits::kChunk; ++i) sum[0] += to_float(chunk[i]);  // 0 past the end
    });
    sum_over_row<kThreads>(sum, scratch);
    center = sum[0] * inverse_n;
  }
  float sums[2] = {};  // of deviations, of their squares
  row.for_each([&](int column, const auto& chunk) {
#pragma unroll
    for (int i = 0; i < Traits::kChunk; ++i) {
      const float deviation = column + i < row.columns.end ? to_float(chunk[i]) - center : 0.0f;
      sums[0] += deviation;
      sums[1] += deviation * deviation;
    }
  });
  sum_over_row<kThreads>(sums, scratch);
  return {center, sums[0], sums[1]};
}

// Of a row whose mean is center + correction.
FASTATTN_DEVICE RowStatistics statistics_of(const LayerNormParams& p, float center, float correction, float variance) {
  // Rounding may leave an equal row a variance just below 0; a comparison, unlike fmaxf, lets NaN through.
  return {center, correction, 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + static_cast<float>(p.eps))};
}

template <typename Traits>
FASTATTN_DEVICE RowStatistics row_statistics(const FwdRow<Traits>& row, typename Traits::Scratch& scratch) {
  const Moments moments = sum_moments(row, row.p.cols, scratch);
  const float inverse_n = 1.0f / static_cast<float>(row.p.cols);
  const float correction = row.p.rms ? 0.0f : moments.deviations * inverse_n;
  return statistics_of(row.p, moments.center, correction, moments.squares * inverse_n - correction * correction);
}

template <typename Traits>
FASTATTN_DEVICE void normalize_row(const FwdRow<Traits>& row, const RowStatistics& statistics) {
  constexpr int kChunk = Traits::kChunk;
  const auto* weight = static_cast<const float*>(row.p.weight);
  const auto* bias = static_cast<const float*>(row.p.bias);
  auto* out = row_pointer<typename Traits::OutElement>(row.p.out, row.row);
  const float offset = -statistics.correction * statistics.rstd;
  row.for_each([&](int column, const auto& chunk) {
    Floats<kChunk> values = to_floats(chunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = (values[i] - statistics.center) * statistics.rstd + offset;
    if (weight != nullptr) {
      const auto scale = load_floats<kChunk>(weight, column, row.columns.end, row.aligned);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] *= scale[i];
    }
    if (bias != nullptr) {
      const auto shift = load_floats<kChunk>(bias, column, row.columns.end, row.aligned);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] += shift[i];
    }
    store_chunk(out, from_floats<typename Traits::OutElement>(values), column, row.columns.end, row.aligned);
  });
}

FASTATTN_DEVICE void store_statistics(const LayerNormParams& p, int64_t row, const RowStatistics& statistics) {
  static_cast<float*>(p.rstd)[row] = statistics.rstd;
  if (!p.rms) static_cast<float*>(p.mean)[row] = statistics.center + statistics.correction;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::Shape::kBlockThreads)
    layer_norm_fwd_kernel(const __grid_constant__ LayerNormParams p, bool aligned) {
  using Shape = typename Traits::Shape;
  FASTATTN_SHARED(scratch, typename Traits::Scratch);
  const int thread = static_cast<int>(threadIdx.x) % Shape::kThreads;
  const int64_t row_index =
      int64_t{blockIdx.x} * Shape::kRowsPerBlock + static_cast<int>(threadIdx.x) / Shape::kThreads;
  const Columns columns = {0, row_index < p.rows ? static_cast<int>(p.cols) : 0};
  FwdRow<Traits> row = {p, row_index, columns, thread, aligned, {p.dropout_p, p.rng_state}, {}};
  row.load();
  const RowStatistics statistics = row_statistics(row, scratch);
  normalize_row(row, statistics);
  if (thread == 0 && row_index < p.rows) store_statistics(p, row_index, statistics);
}

// Whether every access of the forward kernels falls on whole chunks.
template <typename Traits>
bool forward_is_aligned(const LayerNormParams& p) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  constexpr int kChunk = Traits::kChunk;
  return rows_are_aligned<Element>(p.x, kChunk) && rows_are_aligned<OutElement>(p.out, kChunk) &&
         rows_are_aligned<OutElement>(p.input, kChunk) && rows_are_aligned<Element>(p.residual, kChunk) &&
         is_aligned(p.weight, 16) && is_aligned(p.bias, 16);
}

template <typename Traits>
const char* launch_layer_norm_fwd(const LayerNormParams& p, const DeviceLaunch& launch) {
  using Shape = typename Traits::Shape;
  const int64_t blocks = (p.rows + Shape::kRowsPerBlock - 1) / Shape::kRowsPerBlock;
  if (blocks > INT32_MAX) return "more rows than a grid has blocks";
  return launch_kernel(layer_norm_fwd_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kBlockThreads),
                       0, static_cast<cudaStream_t>(launch.stream), p, forward_is_aligned<Traits>(p));
}

}  // namespace fastattn
