// Backward layer norm and RMS norm on the CPU.
//   d   = x - mean (rms: x)           dweight = sum over rows of dout * rstd * d,    dbias = sum over rows of dout
//   dx  = rstd * (dout * weight - mean(dout * weight) - rstd^2 * d * mean(dout * weight * d))       (rms: no second
//   term)
// Work:    a thread takes neighbouring blocks of rows; of long rows two at once, so that weight, dweight and dbias are
//          read and written once for both. Whoever finishes the second of two blocks adds up the pair.
// Memory:  x and dout are read from memory once and, in the second pass, from the cache; dx is written once, past the
//          caches if it would not stay there. Rows that are taken one by one are read without a jump, as prefetchers
//          want them: x was saved long ago and has left the second-level cache, whatever the size of a tensor.
// Numbers: fp32 (fp64 for fp64). The order of every sum is fixed: the same bits for any number of threads. dweight and
//          dbias are summed over groups and chunks of rows in turn, then over a tree of blocks, which keeps rounding
//          small for many rows.
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
// Up to this length rows are taken one by one.
constexpr int64_t kSingleCols = 2048;
// From this size of dx on, little of it would still be in L3 when it is read.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// Rows whose shares of dweight and dbias are added up before they join the block's sums: chains of 64 additions lose
// more than twice what eager's sums do.
constexpr int64_t kChunk = 16;
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
  return {streams || p.cols <= kSingleCols, streams};
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

  // dbias joins this pass, which waits for x and dout, and dweight the next, which is kept busy by its stores.
  for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> weights = load<T>(weight + j, width);
    // The rows at hand are added up by themselves first: short chains of additions lose less to rounding.
    Vec<T> dbiases = Vec<T>::zero();
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const Vec<T> dout_value = load<T>(dout[r] + j, width);
      if constexpr (Traits::kParamGrads) dbiases = dbiases + dout_value;
      // Past the end weights, and so dy, are 0: whatever the deviation is there does not count.
      const Vec<T> dy = dout_value * weights;
      if constexpr (!Traits::kRms) sum_dy[r] = sum_dy[r] + dy;
      sum_dy_d[r] = fma(dy, deviation(r, j, width), sum_dy_d[r]);
    });
    if constexpr (Traits::kParamGrads) store(load<T>(dbias + j, width) + dbiases, dbias + j, width);
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
    Vec<T> dweights = Vec<T>::zero();
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const Vec<T> d = deviation(r, j, width);
      const Vec<T> dout_rstd = load<T>(dout[r] + j, width) * rstd[r];
      if constexpr (Traits::kParamGrads) dweights = fma(dout_rstd, d, dweights);
      Vec<T> gradient = fnma(d, d_scale[r], dout_rstd * weights - dy_term[r]);
      if constexpr (Traits::kAddsGradient) gradient = gradient + load<T>(dnew_residual[r] + j, width);
      if constexpr (kStreams) {
        stream(gradient, dx[r] + j);
      } else {
        store(gradient, dx[r] + j, width);
      }
    });
    if constexpr (Traits::kParamGrads) store(load<T>(dweight + j, width) + dweights, dweight + j, width);
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

// total += term, for dweight and dbias.
template <typename T>
FASTATTN_INLINE void add_sums(T* total, const T* term, int64_t cols) {
  for_each_vector<T>(2 * cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
    store(load<T>(total + j, width) + load<T>(term + j, width), total + j, width);
  });
}

FASTATTN_INLINE int64_t count_blocks(const LayerNormBwdParams& p) {
  return (p.rows + p.rows_per_block - 1) / p.rows_per_block;
}

// In p.partial come the sums of each block, dweight before dbias, and then those of the chunk at hand of each block,
// which only blocks of several chunks touch.
template <typename T>
FASTATTN_INLINE T* block_sums(const LayerNormBwdParams& p, int64_t block) {
  return static_cast<T*>(p.partial) + 2 * block * p.cols;
}

template <typename Traits>
void backward_block(const LayerNormBwdParams& p, int64_t block) {
  using Element = typename Traits::Element;
  using T = typename Traits::T;
  const Sweep sweep = choose_sweep<Element>(p);
  const int64_t begin = block * p.rows_per_block, end = min_of(begin + p.rows_per_block, p.rows);
  T* total = Traits::kParamGrads ? block_sums<T>(p, block) : nullptr;
  T* dweight = nullptr;
  for (int64_t row = begin, count = 0; row < end; row += count) {
    if (Traits::kParamGrads && (row - begin) % kChunk == 0) {
      dweight = row == begin ? total : block_sums<T>(p, count_blocks(p) + block);
      std::memset(dweight, 0, 2 * sizeof(T) * p.cols);
    }
    T* dbias = Traits::kParamGrads ? dweight + p.cols : nullptr;
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
      const bool ends = row + count == end || (row + count - begin) % kChunk == 0;
      if (ends && dweight != total) add_sums(total, dweight, p.cols);
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

// Adds up the blocks' sums in pairs, then those of pairs, of fours...: an addition is made by whoever comes with the
// second of its terms, mostly the thread that made both and has them in its cache. Which sums meet is fixed, and so is
// the result. `arrived` counts, at the first block of a right-hand term, the terms that are there. True to the last.
template <typename T>
FASTATTN_INLINE bool join_block(const LayerNormBwdParams& p, int64_t block, int32_t* arrived) {
  const int64_t blocks = count_blocks(p);
  for (int64_t size = 1; size < blocks; size *= 2) {
    const int64_t left = block / (2 * size) * (2 * size), right = left + size;
    if (right < blocks) {
      if (__atomic_fetch_add(arrived + right, 1, __ATOMIC_ACQ_REL) == 0) return false;
      add_sums(block_sums<T>(p, left), block_sums<T>(p, right), p.cols);
    }
    block = left;
  }
  return true;
}

// dweight, dbias = the sums; 0 if there are no rows.
template <typename T>
FASTATTN_INLINE void write_param_grads(const LayerNormBwdParams& p) {
  const T* sums = p.rows == 0 ? nullptr : block_sums<T>(p, 0);
  const auto write = [&](void* gradient, int64_t at) __attribute__((always_inline)) {
    if (gradient == nullptr) return;
    if (sums == nullptr) {
      std::memset(gradient, 0, sizeof(T) * p.cols);
    } else {
      std::memcpy(gradient, sums + at, sizeof(T) * p.cols);
    }
  };
  write(p.dweight, 0);
  write(p.dbias, p.cols);
}

}  // namespace

void layer_norm_bwd_cpu(const LayerNormBwdParams& p) {
  const int64_t grain = kElementsPerThread / (p.rows_per_block * max_of<int64_t>(p.cols, 1)) + 1;
  const bool param_grads = p.dweight != nullptr || p.dbias != nullptr;
  dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) __attribute__((always_inline)) {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    using T = StatisticsOf<Element>;
    const auto run_block = p.rms ? choose_block<Element, OutElement, true>(p, param_grads)
                                 : choose_block<Element, OutElement, false>(p, param_grads);
    int32_t arrived[kMaxBwdBlocks] = {};
    parallel_ranges(count_blocks(p), grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run_block(p, block);
        if (param_grads && join_block<T>(p, block, arrived)) write_param_grads<T>(p);
      }
    });
    if (p.rows == 0) write_param_grads<T>(p);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
