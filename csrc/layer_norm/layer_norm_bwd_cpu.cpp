// Backward layer norm and RMS norm on the CPU.
//   d   = x - mean (rms: x)           dweight = sum over rows of dout * rstd * d,    dbias = sum over rows of dout
//   dx  = rstd * (dout * weight - mean(dout * weight) - rstd^2 * d * mean(dout * weight * d))       (rms: no second
//   term)
// Work:    a thread takes neighbouring blocks of rows, and of a block two rows at once, so that weight, dweight and
//          dbias are read and written once for both. A second parallel region adds up the blocks.
// Memory:  x and dout are read from memory once and, in the second pass, from the cache; dx is written once. What does
//          not stay in L3 takes one row at a time: x and dout are then read without a jump, as prefetchers want them,
//          and dx is streamed past the caches if it is larger still.
// Numbers: fp32 (fp64 for fp64). The order of every sum is fixed: the same bits for any number of threads. dweight and
//          dbias are summed over groups, chunks and blocks of rows in turn, which keeps rounding small for many rows.
#include "common/parallel.h"
#include "common/simd.h"
#include "common/stream.h"
#include "layer_norm/layer_norm.h"
#include "layer_norm/row_ops.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Rows at once: each takes three pointers, and with more than two of them the second pass runs out of the 16 integer
// registers before it runs out of vector registers.
constexpr int kGroup = 2;
// From this size of dx on, rows that are read twice from the first-level cache are taken one by one.
constexpr int64_t kSingleBytes = int64_t{8} << 20;
constexpr int64_t kSingleCols = 1024;
// From this size of dx on, little of it would still be in L3 when it is read.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// Rows whose shares of dweight and dbias are added up before they join the block's sums.
constexpr int64_t kChunk = 64;
// Fewer elements than this are not worth waking a thread.
constexpr int64_t kElementsPerThread = 8192;

template <typename Element_, typename OutElement_, bool kRms_, bool kParamGrads_, bool kAddsGradient_>
struct BackwardTraits {
  using Element = Element_;
  using OutElement = OutElement_;
  using T = StatisticsOf<Element>;
  static constexpr bool kRms = kRms_;
  static constexpr bool kParamGrads = kParamGrads_;
  // Whether there is a dnew_residual. A test of it in the loop would keep its pointers in registers for nothing.
  static constexpr bool kAddsGradient = kAddsGradient_;
};

// 0 for a row of one element: it is its own mean, whatever it is, and both its gradient and its share of dweight are 0.
// The difference of equal terms, each rounded and then scaled by rstd = eps^-1/2, would not be.
template <typename Traits>
FASTATTN_INLINE typename Traits::T row_rstd_of(const LayerNormBwdParams& p, int64_t row) {
  if (!Traits::kRms && p.cols == 1) return 0;
  return static_cast<const typename Traits::T*>(p.rstd)[row];
}

// How a call's rows are taken: a function of its shape, and so is the order of the sums.
struct Sweep {
  bool single;   // one row at a time
  bool streams;  // and dx past the caches: rows of fp32, of whole aligned vectors, that nobody reads here
};

template <typename Element>
FASTATTN_INLINE Sweep choose_sweep(const LayerNormBwdParams& p) {
  constexpr int64_t kVecBytes = Vec<float>::kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(Element));
  const int64_t bytes = p.rows * row_bytes;
  const bool streams = std::is_same_v<Element, float> && p.dinput.data == nullptr && row_bytes % kVecBytes == 0 &&
                       reinterpret_cast<uintptr_t>(p.dx.data) % kVecBytes == 0 && bytes >= kStreamBytes;
  return {streams || (p.cols <= kSingleCols && bytes >= kSingleBytes), streams};
}

// dx of rows [row, row + kRows), whose share of dweight and dbias is added to the block's sums.
template <typename Traits, int kRows, bool kStreams>
FASTATTN_INLINE void backward_rows(const LayerNormBwdParams& p, int64_t row, typename Traits::T* dweight,
                                   typename Traits::T* dbias) {
  using Element = typename Traits::Element;
  using OutElement = typename Traits::OutElement;
  using T = typename Traits::T;
  const T* weight = static_cast<const T*>(p.weight);
  const Element *x[kRows], *dnew_residual[kRows];
  const OutElement* dout[kRows];
  Element* dx[kRows];
  Vec<T> mean[kRows], rstd[kRows], sum_dy[kRows], sum_dy_d[kRows];
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    x[r] = row_of<const Element>(p.x, row + r);
    dout[r] = row_of<const OutElement>(p.dout, row + r);
    dx[r] = row_of<Element>(p.dx, row + r);
    dnew_residual[r] = row_of<const Element>(p.dnew_residual, row + r);
    mean[r] = Traits::kRms ? Vec<T>::zero() : Vec<T>::set1(static_cast<const T*>(p.mean)[row + r]);
    rstd[r] = Vec<T>::set1(row_rstd_of<Traits>(p, row + r));
    sum_dy[r] = sum_dy_d[r] = Vec<T>::zero();
  });
  const auto deviation = [&](auto r, int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> value = load<T>(x[r] + j, width);
    return Traits::kRms ? value : value - mean[r];
  };

  for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> weights = load<T>(weight + j, width);
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      // Past the end weights, and so dy, are 0: whatever the deviation is there does not count.
      const Vec<T> dy = load<T>(dout[r] + j, width) * weights;
      if constexpr (!Traits::kRms) sum_dy[r] = sum_dy[r] + dy;
      sum_dy_d[r] = fma(dy, deviation(r, j, width), sum_dy_d[r]);
    });
  });

  // dx = (dout * rstd) * weight - dy_term - d_scale * d
  Vec<T> dy_term[kRows], d_scale[kRows];
  const T inverse_n = T(1) / static_cast<T>(p.cols);
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    const T row_rstd = row_rstd_of<Traits>(p, row + r);
    dy_term[r] = Vec<T>::set1(sum_dy[r].reduce_add() * inverse_n * row_rstd);
    d_scale[r] = Vec<T>::set1(sum_dy_d[r].reduce_add() * inverse_n * row_rstd * row_rstd * row_rstd);
  });
  for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> weights = load<T>(weight + j, width);
    // The rows at hand are added up by themselves first: short chains of additions lose less to rounding.
    Vec<T> dweights = Vec<T>::zero(), dbiases = Vec<T>::zero();
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const Vec<T> d = deviation(r, j, width);
      const Vec<T> dout_value = load<T>(dout[r] + j, width);
      const Vec<T> dout_rstd = dout_value * rstd[r];
      if constexpr (Traits::kParamGrads) {
        dweights = fma(dout_rstd, d, dweights);
        dbiases = dbiases + dout_value;
      }
      Vec<T> gradient = fnma(d, d_scale[r], dout_rstd * weights - dy_term[r]);
      if constexpr (Traits::kAddsGradient) gradient = gradient + load<T>(dnew_residual[r] + j, width);
      if constexpr (kStreams) {
        stream(gradient, dx[r] + j);
      } else {
        store(gradient, dx[r] + j, width);
      }
    });
    if constexpr (Traits::kParamGrads) {
      store(load<T>(dweight + j, width) + dweights, dweight + j, width);
      store(load<T>(dbias + j, width) + dbiases, dbias + j, width);
    }
  });
}

// Gradient of add_*'s input: that of new_residual, through dropout, in input's dtype.
template <typename Traits>
FASTATTN_INLINE void input_gradient_row(const LayerNormBwdParams& p, int64_t row) {
  using T = typename Traits::T;
  const auto* dx = row_of<const typename Traits::Element>(p.dx, row);
  auto* dinput = row_of<typename Traits::OutElement>(p.dinput, row);
  if (p.dropout_p > 0.0) {
    const Dropout dropout = make_dropout(p.dropout_p, p.rng_state);
    for_each_dropped_vector<T>(p.cols, dropout, row,
                               [&](int64_t j, auto width, auto drop) __attribute__((always_inline)) {
                                 store(drop(load<T>(dx + j, width)), dinput + j, width);
                               });
  } else {
    for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
      store(load<T>(dx + j, width), dinput + j, width);
    });
  }
}

// total += chunk; chunk = 0.
template <typename T>
FASTATTN_INLINE void move_sums(T* total, T* chunk, int64_t count) {
  for_each_vector<T>(count, [&](int64_t j, auto width) __attribute__((always_inline)) {
    store(load<T>(total + j, width) + load<T>(chunk + j, width), total + j, width);
    store(Vec<T>::zero(), chunk + j, width);
  });
}

// partial[block] holds the block's sums and those of the chunk of rows at hand, dweight before dbias in each.
template <typename T>
FASTATTN_INLINE T* block_sums(const LayerNormBwdParams& p, int64_t block) {
  return static_cast<T*>(p.partial) + 4 * block * p.cols;
}

template <typename Traits>
void backward_block(const LayerNormBwdParams& p, int64_t block) {
  using Element = typename Traits::Element;
  using T = typename Traits::T;
  const Sweep sweep = choose_sweep<Element>(p);
  const int64_t begin = block * p.rows_per_block, end = min_of(begin + p.rows_per_block, p.rows);
  const bool chunked = end - begin > kChunk;
  T *total = nullptr, *dweight = nullptr, *dbias = nullptr;
  if constexpr (Traits::kParamGrads) {
    total = block_sums<T>(p, block);
    dweight = chunked ? total + 2 * p.cols : total;
    dbias = dweight + p.cols;
    std::memset(total, 0, sizeof(T) * (chunked ? 4 : 2) * p.cols);
  }
  for (int64_t row = begin, count = 0; row < end; row += count) {
    count = sweep.single || row + kGroup > end ? 1 : kGroup;
    if (count == kGroup) {
      backward_rows<Traits, kGroup, false>(p, row, dweight, dbias);
    } else if (std::is_same_v<Element, float> && sweep.streams) {
      backward_rows<Traits, 1, std::is_same_v<Element, float>>(p, row, dweight, dbias);
    } else {
      backward_rows<Traits, 1, false>(p, row, dweight, dbias);
    }
    if (p.dinput.data != nullptr) {
      for (int64_t done = row; done < row + count; ++done) input_gradient_row<Traits>(p, done);
    }
    if constexpr (Traits::kParamGrads) {
      const bool last = row + count == end;
      if (chunked && (last || (row + count - begin) % kChunk == 0)) move_sums(total, dweight, 2 * p.cols);
    }
  }
  if (sweep.streams) fence_streams();
}

using BlockFn = void (*)(const LayerNormBwdParams&, int64_t);

template <typename Element, typename OutElement, bool kRms>
BlockFn choose_block(const LayerNormBwdParams& p, bool param_grads) {
  if (p.dnew_residual.data != nullptr) {
    return param_grads ? backward_block<BackwardTraits<Element, OutElement, kRms, true, true>>
                       : backward_block<BackwardTraits<Element, OutElement, kRms, false, true>>;
  }
  return param_grads ? backward_block<BackwardTraits<Element, OutElement, kRms, true, false>>
                     : backward_block<BackwardTraits<Element, OutElement, kRms, false, false>>;
}

// dweight, dbias = sum of the blocks' sums, as many at a time as a chunk has groups.
template <typename T>
void sum_blocks(const LayerNormBwdParams& p, int64_t blocks) {
  constexpr int64_t kBlocks = 16;
  const int64_t grain = kElementsPerThread / max_of<int64_t>(2 * blocks, 1) + 1;
  parallel_ranges(p.cols, grain, [&](int64_t begin, int64_t end) {
    for (int which = 0; which < 2; ++which) {
      T* gradient = static_cast<T*>(which == 0 ? p.dweight : p.dbias);
      if (gradient == nullptr) continue;
      for_each_vector<T>(end - begin, [&](int64_t j, auto width) __attribute__((always_inline)) {
        Vec<T> total = Vec<T>::zero();
        for (int64_t first = 0; first < blocks; first += kBlocks) {
          Vec<T> sum = Vec<T>::zero();
          for (int64_t block = first; block < min_of(first + kBlocks, blocks); ++block) {
            sum = sum + load<T>(block_sums<T>(p, block) + which * p.cols + begin + j, width);
          }
          total = total + sum;
        }
        store(total, gradient + begin + j, width);
      });
    }
  });
}

}  // namespace

void layer_norm_bwd_cpu(const LayerNormBwdParams& p) {
  const int64_t blocks = (p.rows + p.rows_per_block - 1) / p.rows_per_block;
  const int64_t grain = kElementsPerThread / (p.rows_per_block * max_of<int64_t>(p.cols, 1)) + 1;
  const bool param_grads = p.dweight != nullptr || p.dbias != nullptr;
  dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) __attribute__((always_inline)) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    const auto run_block = p.rms ? choose_block<Element, OutElement, true>(p, param_grads)
                                 : choose_block<Element, OutElement, false>(p, param_grads);
    parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) run_block(p, block);
    });
    if (param_grads) sum_blocks<StatisticsOf<Element>>(p, blocks);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
