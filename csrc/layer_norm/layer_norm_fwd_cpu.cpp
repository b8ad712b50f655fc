// Forward layer norm and RMS norm on the CPU.
// Work:    a thread takes neighbouring rows.
// Memory:  a row is read from memory once; the second pass finds it in the first-level cache (rows of more than kBlock
//          elements: in the cache that holds them). A large new_residual is streamed past the caches: it is next read
//          after a whole sub-layer, and without it there is more room for the output, which is read at once. An output
//          too large for that is streamed as well: lines that are written whole need not be read first.
// Numbers: squares are summed about a guess of the mean, so that a large mean costs no accuracy, and the sum about the
//          guess corrects both. A guess further off than a standard deviation would cost some: then a second pass sums
//          about the mean. fp32 statistics (fp64 for fp64), combined over blocks in fp64.
// Source:  Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, eqs. 1.7 and 2.1.
#include "common/parallel.h"
#include "common/simd.h"
#include "common/stream.h"
#include "layer_norm/layer_norm.h"
#include "layer_norm/row_ops.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// 16 KiB of fp32: two passes over a block stay in any first-level cache.
constexpr int64_t kBlock = 4096;
// Fewer elements than this are not worth waking a thread.
constexpr int64_t kElementsPerThread = 16384;

// A new_residual from here on is streamed. Smaller ones may still be in L3 when they are read.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
// An output from here on is streamed: its first rows are gone from L3 before the last is written.
constexpr int64_t kStreamOutBytes = int64_t{32} << 20;

enum class Affine { kNone, kWeight, kWeightBias };

template <typename T>
struct Statistics {
  // The mean is center + correction: their sum is more exact than T holds.
  T center, correction, rstd;
};

template <typename T, typename Element>
FASTATTN_INLINE T sum_of_squares(const Element* x, int64_t n) {
  Vec<T> sums[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
  for_each_vector_slotted<T, 4>(n, [&](auto slot, int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> value = load<T>(x + j, width);
    sums[slot] = fma(value, value, sums[slot]);
  });
  return sum_of(sums).reduce_add();
}

template <typename T, typename Element>
FASTATTN_INLINE T sum_of_values(const Element* x, int64_t n) {
  Vec<T> sums[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
  for_each_vector_slotted<T, 4>(n, [&](auto slot, int64_t j, auto width) __attribute__((always_inline)) {
    sums[slot] = sums[slot] + load<T>(x + j, width);
  });
  return sum_of(sums).reduce_add();
}

// Sums of (x - center) and of its square.
template <typename T, typename Element>
FASTATTN_INLINE void deviations(const Element* x, int64_t n, T center, T& sum, T& sum_squares) {
  Vec<T> sums[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
  Vec<T> squares[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
  const Vec<T> about = Vec<T>::set1(center);
  for_each_vector_slotted<T, 4>(n, [&](auto slot, int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> deviation = zero_past_end(load<T>(x + j, width) - about, width);
    sums[slot] = sums[slot] + deviation;
    squares[slot] = fma(deviation, deviation, squares[slot]);
  });
  sum = sum_of(sums).reduce_add();
  sum_squares = sum_of(squares).reduce_add();
}

// A guess at the mean of a row: the mean of four vectors spread over it.
template <typename T, typename Element>
FASTATTN_INLINE T guess_mean(const Element* x, int64_t n, double inverse_n) {
  constexpr int kLanes = Vec<T>::kLanes;
  if (n < 4 * kLanes) return static_cast<T>(sum_of_values<T>(x, n) * inverse_n);
  const int64_t step = (n - kLanes) / 3;
  const Vec<T> vectors[4] = {Vec<T>::load_as(x), Vec<T>::load_as(x + step), Vec<T>::load_as(x + 2 * step),
                             Vec<T>::load_as(x + 3 * step)};
  return sum_of(vectors).reduce_add() * (T(1) / (4 * kLanes));
}

template <typename T, bool kRms, typename Element>
FASTATTN_INLINE Statistics<T> row_statistics(const Element* x, int64_t n, double inverse_n, double eps) {
  double mean = 0.0, squares = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = min_of(n - begin, kBlock);
    if constexpr (kRms) {
      squares += sum_of_squares<T>(x + begin, count);
    } else {
      const double inverse_count = count == n ? inverse_n : 1.0 / static_cast<double>(count);
      T center = guess_mean<T>(x + begin, count, inverse_count);
      T rest, block_squares;
      deviations(x + begin, count, center, rest, block_squares);
      // Half or more of the squares come from the guess, or something is not finite.
      if (!(rest * (rest * inverse_count) <= block_squares * 0.5)) {
        center = static_cast<T>(sum_of_values<T>(x + begin, count) * inverse_count);
        deviations(x + begin, count, center, rest, block_squares);
      }
      const double block_mean = center + rest * inverse_count;
      const double about_mean = block_squares - rest * (rest * inverse_count);
      if (begin == 0) {
        mean = block_mean;
        squares = about_mean;
      } else {
        const double seen = static_cast<double>(begin), total = static_cast<double>(begin + count);
        const double delta = block_mean - mean;
        mean += delta * (static_cast<double>(count) / total);
        squares += about_mean + delta * delta * (seen * static_cast<double>(count) / total);
      }
    }
  }
  // Rounding may leave an equal row a variance just below 0; a comparison, unlike max, lets NaN through.
  const double variance = squares * inverse_n;
  const double rstd = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps);
  const T center = static_cast<T>(mean);
  return {center, static_cast<T>(mean - center), static_cast<T>(rstd)};
}

template <bool kRms, Affine kAffine, bool kStreams, typename T, typename Element, typename OutElement>
FASTATTN_INLINE void normalize_values(OutElement* out, const Element* x, int64_t n, const Statistics<T>& statistics,
                                      const T* weight, const T* bias) {
  const Vec<T> center = Vec<T>::set1(statistics.center), rstd = Vec<T>::set1(statistics.rstd);
  const Vec<T> offset = Vec<T>::set1(-statistics.correction * statistics.rstd);
  for_each_vector<T>(n, [&](int64_t j, auto width) __attribute__((always_inline)) {
    Vec<T> value = load<T>(x + j, width);
    if constexpr (kRms) {
      value = value * rstd;
    } else {
      value = fma(value - center, rstd, offset);
    }
    if constexpr (kAffine == Affine::kWeight) value = value * load<T>(weight + j, width);
    if constexpr (kAffine == Affine::kWeightBias)
      value = fma(value, load<T>(weight + j, width), load<T>(bias + j, width));
    if constexpr (kStreams) {
      stream(value, out + j);
    } else {
      store(value, out + j, width);
    }
  });
}

template <bool kRms, Affine kAffine, typename OutElement, typename T, typename Element>
FASTATTN_INLINE void normalize_row(const LayerNormParams& p, int64_t row, const Element* x,
                                   const Statistics<T>& statistics, bool streams) {
  OutElement* out = row_of<OutElement>(p.out, row);
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  if constexpr (std::is_same_v<OutElement, float> && std::is_same_v<T, float>) {
    if (streams) return normalize_values<kRms, kAffine, true>(out, x, p.cols, statistics, weight, bias);
  }
  normalize_values<kRms, kAffine, false>(out, x, p.cols, statistics, weight, bias);
}

// keep(value, column, width) gets the vectors of new_residual = residual + dropout(input), not yet rounded.
template <typename Element, typename InputElement, typename Keep>
FASTATTN_INLINE void add_row(const LayerNormParams& p, int64_t row, Keep&& keep) {
  using T = StatisticsOf<Element>;
  const Element* residual = row_of<const Element>(p.residual, row);
  const InputElement* input = row_of<const InputElement>(p.input, row);
  if (p.dropout_p > 0.0) {
    const Dropout dropout = make_dropout(p.dropout_p, p.rng_state);
    for_each_dropped_vector<T>(p.cols, dropout, row,
                               [&](int64_t j, auto width, auto drop) __attribute__((always_inline)) {
                                 keep(drop(load<T>(input + j, width)) + load<T>(residual + j, width), j, width);
                               });
  } else {
    for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
      keep(load<T>(input + j, width) + load<T>(residual + j, width), j, width);
    });
  }
}

// Whether there are `bytes` of these rows or more, and they are of whole aligned vectors of fp32.
template <typename Element>
bool streams_rows(const LayerNormParams& p, const RowTensor& rows, int64_t bytes) {
  constexpr int64_t kVecBytes = Vec<float>::kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(float));
  return std::is_same_v<Element, float> && row_bytes % kVecBytes == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % kVecBytes == 0 && p.rows * row_bytes >= bytes;
}

// A row of new_residual is copied to be read again: it must fit into a block.
template <typename Element>
bool streams_residual(const LayerNormParams& p) {
  return p.residual.data != nullptr && p.cols <= kBlock && streams_rows<Element>(p, p.x, kStreamBytes);
}

// Writes a row of new_residual and returns where to read it: `copy`, which has room for a block, if it was streamed.
template <typename Element, typename InputElement>
FASTATTN_INLINE const Element* write_residual_row(const LayerNormParams& p, int64_t row, bool streams, Element* copy) {
  Element* sum = row_of<Element>(p.x, row);
  if constexpr (std::is_same_v<Element, float>) {
    if (streams) {
      add_row<Element, InputElement>(p, row,
                                     [&](Vec<float> value, int64_t j, auto width) __attribute__((always_inline)) {
                                       store(value, copy + j, width);
                                       stream(value, sum + j);
                                     });
      return copy;
    }
  }
  // The row is read again, rounded as it is stored, by what normalises it.
  add_row<Element, InputElement>(
      p, row, [&](auto value, int64_t j, auto width) __attribute__((always_inline)) { store(value, sum + j, width); });
  return sum;
}

template <typename Element, typename OutElement, bool kRms, Affine kAffine>
void forward_rows(const LayerNormParams& p, int64_t begin, int64_t end) {
  using T = StatisticsOf<Element>;
  const double inverse_n = p.cols > 0 ? 1.0 / static_cast<double>(p.cols) : 0.0;
  const bool streams_new_residual = streams_residual<Element>(p);
  const bool streams_out = streams_rows<OutElement>(p, p.out, kStreamOutBytes);
  alignas(64) Element copy[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const Element* x = row_of<const Element>(p.x, row);
    if (p.residual.data != nullptr) x = write_residual_row<Element, OutElement>(p, row, streams_new_residual, copy);
    const Statistics<T> statistics = row_statistics<T, kRms>(x, p.cols, inverse_n, p.eps);
    if constexpr (!kRms) static_cast<T*>(p.mean)[row] = statistics.center;
    static_cast<T*>(p.rstd)[row] = statistics.rstd;
    normalize_row<kRms, kAffine, OutElement>(p, row, x, statistics, streams_out);
  }
  if (streams_new_residual || streams_out) fence_streams();
}

}  // namespace

void layer_norm_fwd_cpu(const LayerNormParams& p) {
  const int64_t grain = kElementsPerThread / max_of<int64_t>(p.cols, 1) + 1;
  dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) __attribute__((always_inline)) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    void (*rows)(const LayerNormParams&, int64_t, int64_t);
    if (p.rms) {
      rows = p.weight == nullptr ? forward_rows<Element, OutElement, true, Affine::kNone>
                                 : forward_rows<Element, OutElement, true, Affine::kWeight>;
    } else {
      rows = p.weight == nullptr ? forward_rows<Element, OutElement, false, Affine::kNone>
             : p.bias == nullptr ? forward_rows<Element, OutElement, false, Affine::kWeight>
                                 : forward_rows<Element, OutElement, false, Affine::kWeightBias>;
    }
    parallel_ranges(p.rows, grain, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
