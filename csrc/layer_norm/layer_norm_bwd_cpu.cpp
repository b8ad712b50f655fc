// Backward layer norm and RMS norm on the CPU.
//   d   = x - mean (rms: x)           dweight = sum over rows of dout * rstd * d,    dbias = sum over rows of dout
//   dx  = rstd * (dout * weight - mean(dout * weight) - rstd^2 * d * mean(dout * weight * d))       (rms: no second
//   term)
// Work:    a thread takes neighbouring blocks of rows. In a tensor that caches hold, the second pass of a row, full of
//          stores, shares a loop with the first pass of the next, which waits for its sums. Long rows come two at once,
//          so that weight, dweight and dbias are read and written once for both. Whoever finishes the second of two
//          blocks adds up the pair.
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
// Above this size of dx, memory is slower for two rows read in turns than for one after the other.
constexpr int64_t kJoinedBytes = int64_t{4} << 20;
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
enum class Sweep {
  kJoined,    // one at a time, the second pass of each in one loop with the first pass of the next
  kSingles,   // one at a time, pass after pass
  kStreamed,  // so, and dx past the caches: rows of fp32, of whole aligned vectors, that nobody reads here
  kGroups,    // kGroup at a time
};

template <typename Element>
FASTATTN_INLINE Sweep choose_sweep(const LayerNormBwdParams& p) {
  constexpr int64_t kVecBytes = Vec<float>::kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(Element));
  const int64_t bytes = p.rows * row_bytes;
  const bool streams = std::is_same_v<Element, float> && p.dinput.data == nullptr && row_bytes % kVecBytes == 0 &&
                       reinterpret_cast<uintptr_t>(p.dx.data) % kVecBytes == 0 && bytes >= kStreamBytes;
  if (streams) return Sweep::kStreamed;
  if (p.cols > kSingleCols) return Sweep::kGroups;
  return bytes <= kJoinedBytes ? Sweep::kJoined : Sweep::kSingles;
}

// What a row's first pass leaves to its second: the sums of dy = dout * weight and of dy * d.
template <typename T>
struct RowSums {
  Vec<T> dy, dy_d;
};

template <typename Traits>
struct FirstPass {
  using T = typename Traits::T;

  FASTATTN_INLINE void begin(const LayerNormBwdParams& p, int64_t row) {
    x = row_of<const typename Traits::Element>(p.x, row);
    dout = row_of<const typename Traits::OutElement>(p.dout, row);
    mean = Traits::kRms ? Vec<T>::zero() : Vec<T>::set1(static_cast<const T*>(p.mean)[row]);
    sums = {Vec<T>::zero(), Vec<T>::zero()};
  }

  // Returns dout, the row's share of dbias.
  template <typename Width>
  FASTATTN_INLINE Vec<T> visit(int64_t j, Width width, Vec<T> weights) {
    const Vec<T> dout_value = load<T>(dout + j, width);
    // Past the end weights, and so dy, are 0: whatever the deviation is there does not count.
    const Vec<T> dy = dout_value * weights;
    if constexpr (!Traits::kRms) sums.dy = sums.dy + dy;
    const Vec<T> value = load<T>(x + j, width);
    sums.dy_d = fma(dy, Traits::kRms ? value : value - mean, sums.dy_d);
    return dout_value;
  }

  const typename Traits::Element* x;
  const typename Traits::OutElement* dout;
  Vec<T> mean;
  RowSums<T> sums;
};

// dx = (dout * rstd) * weight - dy_term - d_scale * d
template <typename Traits>
struct SecondPass {
  using T = typename Traits::T;

  FASTATTN_INLINE void begin(const LayerNormBwdParams& p, int64_t row, const RowSums<T>& sums) {
    x = row_of<const typename Traits::Element>(p.x, row);
    dout = row_of<const typename Traits::OutElement>(p.dout, row);
    dnew_residual = row_of<const typename Traits::Element>(p.dnew_residual, row);
    dx = row_of<typename Traits::Element>(p.dx, row);
    mean = Traits::kRms ? Vec<T>::zero() : Vec<T>::set1(static_cast<const T*>(p.mean)[row]);
    const T row_rstd = row_rstd_of<Traits>(p, row), inverse_n = T(1) / static_cast<T>(p.cols);
    rstd = Vec<T>::set1(row_rstd);
    dy_term = Vec<T>::set1(sums.dy.reduce_add() * inverse_n * row_rstd);
    d_scale = Vec<T>::set1(sums.dy_d.reduce_add() * inverse_n * row_rstd * row_rstd * row_rstd);
  }

  // Writes dx; returns dweights plus the row's share.
  template <bool kStreams, typename Width>
  FASTATTN_INLINE Vec<T> visit(int64_t j, Width width, Vec<T> weights, Vec<T> dweights) {
    const Vec<T> value = load<T>(x + j, width);
    const Vec<T> d = Traits::kRms ? value : value - mean;
    const Vec<T> dout_rstd = load<T>(dout + j, width) * rstd;
    Vec<T> gradient = fnma(d, d_scale, dout_rstd * weights - dy_term);
    if constexpr (Traits::kAddsGradient) gradient = gradient + load<T>(dnew_residual + j, width);
    if constexpr (kStreams) {
      stream(gradient, dx + j);
    } else {
      store(gradient, dx + j, width);
    }
    return Traits::kParamGrads ? fma(dout_rstd, d, dweights) : dweights;
  }

  const typename Traits::Element *x, *dnew_residual;
  const typename Traits::OutElement* dout;
  typename Traits::Element* dx;
  Vec<T> mean, rstd, dy_term, d_scale;
};

// Where rows' shares of dweight or dbias are added up.
template <typename T>
struct RunningSum {
  template <typename Width>
  FASTATTN_INLINE void add(int64_t j, Width width, Vec<T> shares) const {
    store(select(goes_on, load<T>(data + j, width), Vec<T>::zero()) + shares, data + j, width);
  }

  T* data = nullptr;
  typename Vec<T>::Mask goes_on{};  // no lane: a new sum, and what the memory holds is nothing
};

// The first pass over rows [row, row + kRows), if kStarts, and the second over the kRows rows before, if kFinishes, in
// one loop; `sums` comes from one call to the next. The shares of the former join dbias, of the latter dweight: the
// first pass waits for x and dout, the second is kept busy by its stores.
template <typename Traits, int kRows, bool kStarts, bool kFinishes, bool kStreams>
void pass_rows(const LayerNormBwdParams& p, int64_t row, RowSums<typename Traits::T> (&sums)[kRows],
               const RunningSum<typename Traits::T>& dweight, const RunningSum<typename Traits::T>& dbias) {
  using T = typename Traits::T;
  const T* weight = static_cast<const T*>(p.weight);
  FirstPass<Traits> first[kRows];
  SecondPass<Traits> second[kRows];
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    if constexpr (kStarts) first[r].begin(p, row + r);
    if constexpr (kFinishes) second[r].begin(p, row - kRows + r, sums[r]);
  });
  for_each_vector<T>(p.cols, [&](int64_t j, auto width) __attribute__((always_inline)) {
    const Vec<T> weights = load<T>(weight + j, width);
    // The rows at hand are added up by themselves first: short chains of additions lose less to rounding.
    Vec<T> dweights = Vec<T>::zero(), dbiases = Vec<T>::zero();
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      if constexpr (kStarts) dbiases = dbiases + first[r].visit(j, width, weights);
      if constexpr (kFinishes) dweights = second[r].template visit<kStreams>(j, width, weights, dweights);
    });
    if constexpr (kStarts && Traits::kParamGrads) dbias.add(j, width, dbiases);
    if constexpr (kFinishes && Traits::kParamGrads) dweight.add(j, width, dweights);
  });
  if constexpr (kStarts) unroll<kRows>(FASTATTN_LAMBDA(r) { sums[r] = first[r].sums; });
}

// Gradient of add_*'s input: that of new_residual, through dropout, in input's dtype.
template <typename Traits>
void input_gradient_row(const LayerNormBwdParams& p, int64_t row) {
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

// total += term
template <typename T>
void add_sums(T* total, const T* term, int64_t n) {
  for_each_vector<T>(n, [&](int64_t j, auto width) __attribute__((always_inline)) {
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

// dweight or dbias of a block while its rows join one by one, in rising order: chunk after chunk is added to the total.
template <typename T>
struct ChunkedSum {
  // What row `i` of the block, or the group from it on, is added to. `close` comes after the last of these rows.
  FASTATTN_INLINE RunningSum<T> open(int64_t i) const {
    return {i < kChunk ? total : chunk, Vec<T>::first_lanes(i % kChunk == 0 ? 0 : Vec<T>::kLanes)};
  }
  FASTATTN_INLINE void close(int64_t i, bool is_last) const {
    if (i >= kChunk && (is_last || (i + 1) % kChunk == 0)) add_sums(total, chunk, cols);
  }

  T *total = nullptr, *chunk = nullptr;
  int64_t cols = 0;
};

// Rows [begin, begin + rows) of a block, whose sums they join.
template <typename Traits>
struct Block {
  using T = typename Traits::T;

  FASTATTN_INLINE Block(const LayerNormBwdParams& params, int64_t block)
      : p(params), begin(block * p.rows_per_block), rows(min_of(p.rows_per_block, p.rows - begin)) {
    if constexpr (!Traits::kParamGrads) return;
    T *total = block_sums<T>(p, block), *chunk = block_sums<T>(p, count_blocks(p) + block);
    dweight = {total, chunk, p.cols};
    dbias = {total + p.cols, chunk + p.cols, p.cols};
  }

  // Starts the kRows rows from the block's row i on, finishes those before.
  template <int kRows, bool kStarts, bool kFinishes, bool kStreams>
  void pass(int64_t i, RowSums<T> (&sums)[kRows]) const {
    RunningSum<T> dweight_at, dbias_at;
    if constexpr (kStarts && Traits::kParamGrads) dbias_at = dbias.open(i);
    if constexpr (kFinishes && Traits::kParamGrads) dweight_at = dweight.open(i - kRows);
    pass_rows<Traits, kRows, kStarts, kFinishes, kStreams>(p, begin + i, sums, dweight_at, dbias_at);
    if constexpr (kStarts && Traits::kParamGrads) dbias.close(i + kRows - 1, i + kRows == rows);
    if constexpr (!kFinishes) return;
    if constexpr (Traits::kParamGrads) dweight.close(i - 1, i == rows);
    if (p.dinput.data == nullptr) return;
    for (int64_t done = i - kRows; done < i; ++done) input_gradient_row<Traits>(p, begin + done);
  }

  FASTATTN_INLINE void take_joined() const {
    RowSums<T> sums[1];
    pass<1, true, false, false>(0, sums);
    for (int64_t i = 1; i < rows; ++i) pass<1, true, true, false>(i, sums);
    pass<1, false, true, false>(rows, sums);
  }

  // From the block's row i on, kRows at a time; returns the row after the last.
  template <int kRows, bool kStreams>
  FASTATTN_INLINE int64_t take_apart(int64_t i) const {
    for (; i + kRows <= rows; i += kRows) {
      RowSums<T> sums[kRows];
      pass<kRows, true, false, false>(i, sums);
      pass<kRows, false, true, kStreams>(i + kRows, sums);
    }
    return i;
  }

  const LayerNormBwdParams& p;
  int64_t begin, rows;
  ChunkedSum<T> dweight, dbias;
};

template <typename Traits>
void backward_block(const LayerNormBwdParams& p, int64_t block) {
  using Element = typename Traits::Element;
  constexpr bool kMayStream = std::is_same_v<Element, float>;
  const Block<Traits> rows(p, block);
  switch (choose_sweep<Element>(p)) {
    case Sweep::kJoined:
      return rows.take_joined();
    case Sweep::kStreamed:
      rows.template take_apart<1, kMayStream>(0);
      return fence_streams();
    case Sweep::kGroups:
      rows.template take_apart<1, false>(rows.template take_apart<kGroup, false>(0));
      return;
    case Sweep::kSingles:
      rows.template take_apart<1, false>(0);
  }
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
      add_sums(block_sums<T>(p, left), block_sums<T>(p, right), 2 * p.cols);
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
