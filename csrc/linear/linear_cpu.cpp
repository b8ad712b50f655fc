// Linear layer:  out = activation(input @ weight^T + bias), from the weight as nn.Linear keeps it.
// Work:    a thread takes neighbouring blocks of columns. Both operands have their depth contiguous, so a vector of
//          sums runs along it: no packing, which is what a product of few rows cannot pay for.
// Memory:  the weight streams past once a panel of input rows, and a tile of it stays in L1 for all of them; the panel
//          stays in L2. One row has two operations for 4 bytes of weight: everything else hides behind reading those.
// Numbers: fp32 sums, one of each lane, added at the end of each slice of the depth; bias and activation in fp32; one
//          rounding to the output's type. A sum's order depends on the number of rows only, not on threads.
#include "common/activation_cpu.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "linear/linear.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// A tile is kTileRows rows of the input times kTileColumns rows of the weight: its sums fill half of AVX-512's 32
// registers, and with the operands all of AVX2's 16.
constexpr int kTileRows = 4;
#if defined(__AVX512F__)
constexpr int kTileColumns = 4;
#else
constexpr int kTileColumns = 3;
#endif
// Whole tiles and whole vectors of either.
constexpr int kBlockColumns = 48;
static_assert(kBlockColumns % kTileColumns == 0 && kBlockColumns % Vec<float>::kLanes == 0);
// The rows whose sums wait for the epilogue of a block.
constexpr int kBlockRows = 32;
constexpr int64_t kPanelRows = 256;
// Tiles of both operands are 16 KiB of fp32 each: together they fit L1.
constexpr int64_t kSliceDepth = 1024;
// Products that are not worth a second thread.
constexpr int64_t kSerialProducts = 1 << 17;

// Adds to sums[row][column] the products of kRows rows at `input` with kColumns rows at `weight`, `depth` of each.
// kPrefetch: the weight's next tile is asked for meanwhile. With several rows there is so much to do between two lines
// that the hardware would ask too late.
template <int kRows, int kColumns, bool kPrefetch, typename Element>
FASTATTN_INLINE void multiply_tile(const LinearParams& p, int64_t depth, const Element* input, const Element* weight,
                                   float (*sums)[kBlockColumns]) {
  using V = Vec<float>;
  // One row has few sums: two of each hide the latency of their additions.
  constexpr int kChains = kRows == 1 ? 2 : 1;
  V totals[kChains * kRows * kColumns];
  unroll<kChains * kRows * kColumns>(FASTATTN_LAMBDA(i) { totals[i] = V::zero(); });
  const auto step = [&](auto chain, auto&& load) __attribute__((always_inline)) {
    V w[kColumns];
    unroll<kColumns>(FASTATTN_LAMBDA(c) { w[c] = load(weight + c * p.stride_weight); });
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const V x = load(input + r * p.stride_input);
      unroll<kColumns>(FASTATTN_LAMBDA(c) {
        V& total = totals[(chain * kRows + r) * kColumns + c];
        total = fma(x, w[c], total);
      });
    });
  };
  int64_t k = 0;
  for (; k + kChains * V::kLanes <= depth; k += kChains * V::kLanes) {
    if constexpr (kPrefetch) {
      unroll<kColumns>(FASTATTN_LAMBDA(c) { __builtin_prefetch(weight + (kColumns + c) * p.stride_weight + k, 0, 2); });
    }
    unroll<kChains>(FASTATTN_LAMBDA(chain) {
      step(chain,
           [&](const Element* row) __attribute__((always_inline)) { return V::load_as(row + k + chain * V::kLanes); });
    });
  }
  for (; k < depth; k += V::kLanes) {
    const int rest = static_cast<int>(min_of<int64_t>(depth - k, V::kLanes));
    step(std::integral_constant<int, 0>{},
         [&](const Element* row) __attribute__((always_inline)) { return V::load_as_partial(row + k, rest); });
  }
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    unroll<kColumns>(FASTATTN_LAMBDA(c) {
      V total = totals[r * kColumns + c];
      if constexpr (kChains == 2) total = total + totals[(kRows + r) * kColumns + c];
      sums[r][c] += total.reduce_add();
    });
  });
}

// 1 to kTileRows rows of the input. With one row the hardware keeps up by itself.
template <int kColumns, bool kFirst, typename Element>
void multiply_tile_of(int rows, const LinearParams& p, int64_t depth, const Element* input, const Element* weight,
                      float (*sums)[kBlockColumns]) {
  static_assert(kTileRows == 4);
  switch (rows) {
    case 4:
      return multiply_tile<4, kColumns, kFirst>(p, depth, input, weight, sums);
    case 3:
      return multiply_tile<3, kColumns, kFirst>(p, depth, input, weight, sums);
    case 2:
      return multiply_tile<2, kColumns, kFirst>(p, depth, input, weight, sums);
    case 1:
      return multiply_tile<1, kColumns, false>(p, depth, input, weight, sums);
  }
}

// All rows of a block: after the first few the weight's tile is in L1.
template <int kColumns, typename Element>
void multiply_rows(const LinearParams& p, const Element* input, int rows, const Element* weight,
                   float (*sums)[kBlockColumns]) {
  for (int64_t k = 0; k < p.depth; k += kSliceDepth) {
    const int64_t depth = min_of(p.depth - k, kSliceDepth);
    multiply_tile_of<kColumns, true>(min_of(rows, kTileRows), p, depth, input + k, weight + k, sums);
    for (int row = kTileRows; row < rows; row += kTileRows) {
      multiply_tile_of<kColumns, false>(min_of(rows - row, kTileRows), p, depth, input + row * p.stride_input + k,
                                        weight + k, sums + row);
    }
  }
}

template <Activation kActivation, typename Element>
void finish_rows(const LinearParams& p, const float (*sums)[kBlockColumns], int rows, int columns, const Element* bias,
                 Element* out) {
  using V = Vec<float>;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; c += V::kLanes) {
      const int count = min_of(columns - c, V::kLanes);
      V value = V::load(sums[r] + c);
      if (bias != nullptr) value = value + V::load_as_partial(bias + c, count);
      activate<kActivation>(value).store_as_partial(out + r * p.columns + c, count);
    }
  }
}

template <typename Element>
using FinishFn = void (*)(const LinearParams&, const float (*)[kBlockColumns], int, int, const Element*, Element*);

template <typename Element>
FinishFn<Element> finish_for(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return finish_rows<Activation::kNone, Element>;
    case Activation::kRelu:
      return finish_rows<Activation::kRelu, Element>;
    case Activation::kGelu:
      return finish_rows<Activation::kGelu, Element>;
    case Activation::kGeluTanh:
      return finish_rows<Activation::kGeluTanh, Element>;
    case Activation::kSilu:
      return finish_rows<Activation::kSilu, Element>;
  }
  return nullptr;
}

template <typename Element>
void multiply_block(const LinearParams& p, int64_t first_row, int64_t first_column, FinishFn<Element> finish) {
  // Lanes past the last column are computed on, too.
  float sums[kBlockRows][kBlockColumns] = {};
  const int rows = static_cast<int>(min_of<int64_t>(p.rows - first_row, kBlockRows));
  const int columns = static_cast<int>(min_of<int64_t>(p.columns - first_column, kBlockColumns));
  const Element* input = static_cast<const Element*>(p.input) + first_row * p.stride_input;
  const Element* weight = static_cast<const Element*>(p.weight) + first_column * p.stride_weight;
  const auto sums_of = [&](int column) { return reinterpret_cast<float (*)[kBlockColumns]>(&sums[0][column]); };
  int c = 0;
  for (; c + kTileColumns <= columns; c += kTileColumns) {
    multiply_rows<kTileColumns>(p, input, rows, weight + c * p.stride_weight, sums_of(c));
  }
  for (; c < columns; ++c) multiply_rows<1>(p, input, rows, weight + c * p.stride_weight, sums_of(c));
  const Element* bias = p.bias == nullptr ? nullptr : static_cast<const Element*>(p.bias) + first_column;
  finish(p, sums, rows, columns, bias, static_cast<Element*>(p.out) + first_row * p.columns + first_column);
}

template <typename Element>
void linear(const LinearParams& p) {
  const FinishFn<Element> finish = finish_for<Element>(p.activation);
  const int64_t blocks = (p.columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t panels = (p.rows + kPanelRows - 1) / kPanelRows;
  const int64_t products = max_of<int64_t>(kBlockColumns * p.depth * min_of(p.rows, kPanelRows), 1);
  parallel_ranges(panels * blocks, kSerialProducts / products + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / blocks * kPanelRows, last_row = min_of(first_row + kPanelRows, p.rows);
      for (int64_t row = first_row; row < last_row; row += kBlockRows) {
        multiply_block<Element>(p, row, task % blocks * kBlockColumns, finish);
      }
    }
  });
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return linear<BFloat16>(p);
    case DType::kFloat16:
      return linear<Float16>(p);
    default:
      return linear<float>(p);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
