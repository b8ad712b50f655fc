// The matrix products of the attention backward: at most 64 rows, cut into strips that fit the register tile.
#pragma once

#include "attention/attention_operand_cpu.h"
#include "attention/attention_scores_cpu.h"
#include "common/gemm_tile.h"
#include "common/read_ahead.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows of a tile, which has kTileKeys columns.
constexpr int kTileQueries = 64;
// 64 rows are 10 strips of 6 and one of 4; 63 rows 10 of 6, one of 2 and one of 1.
constexpr int kMaxStrips = 12;

FASTATTN_INLINE int strip_rows(int rows_left) {
  return rows_left >= kTileRows ? kTileRows : rows_left >= 4 ? 4 : rows_left >= 2 ? 2 : 1;
}

// What a product may leave out, strip by strip: parts of the result that nobody reads, and terms known to be zero.
struct StripLimits {
  // The terms [depth_begin, depth_end) are added up, and the first `columns` columns of the result computed.
  int depth_begin[kMaxStrips], depth_end[kMaxStrips], columns[kMaxStrips];
  // How many terms are summed in one chain of multiply-adds.
  int chain = kWholeSum;
  // Makes a step with each strip, unless it is nullptr.
  ReadAhead* ahead = nullptr;

  FASTATTN_INLINE void set_all(int depth, int all_columns) {
    for (int strip = 0; strip < kMaxStrips; ++strip) {
      depth_begin[strip] = 0;
      depth_end[strip] = depth;
      columns[strip] = all_columns;
    }
  }
};

// An operand read element by element: (row, k) is at data[row * row_stride + k * k_stride].
template <typename T>
struct Broadcast {
  const T* data;
  int64_t row_stride, k_stride;
};
// An operand, or the result, read in vectors: rows padded to whole vectors.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

namespace detail {

template <int kRows, int kVecs, typename T, typename Operand>
__attribute__((noinline)) void gemm_strip(T* c, int64_t ldc, const Operand* a, int64_t a_row_stride, int64_t a_k_stride,
                                          const Operand* b, int64_t ldb, int depth, bool accumulate) {
  using V = Vec<T>;
  V acc[kRows][kVecs];
  unroll<kRows>(FASTATTN_LAMBDA(r) { unroll<kVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = V::zero(); }); });
  gemm_tile(acc, a, a_row_stride, a_k_stride, b, ldb, depth);
  // Each tile's terms are summed from zero and then added: rounding grows with the square roots of 64 and of the number
  // of tiles, where one running sum over all keys would grow with that of their product.
  if (accumulate) {
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      unroll<kVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = acc[r][v] + V::load(c + r * ldc + v * V::kLanes); });
    });
  }
  unroll<kRows>(
      FASTATTN_LAMBDA(r) { unroll<kVecs>(FASTATTN_LAMBDA(v) { acc[r][v].store(c + r * ldc + v * V::kLanes); }); });
}

template <typename T, typename Operand>
using StripFn = void (*)(T*, int64_t, const Operand*, int64_t, int64_t, const Operand*, int64_t, int, bool);

template <int kRows, typename T, typename Operand>
FASTATTN_INLINE StripFn<T, Operand> choose_strip(int vecs) {
  if constexpr (kTileVecs >= 4) {
    if (vecs == 4) return gemm_strip<kRows, 4, T, Operand>;
    if (vecs == 3) return gemm_strip<kRows, 3, T, Operand>;
  }
  return vecs == 2 ? gemm_strip<kRows, 2, T, Operand> : gemm_strip<kRows, 1, T, Operand>;
}
template <typename T, typename Operand>
FASTATTN_INLINE StripFn<T, Operand> choose_strip(int rows, int vecs) {
  switch (rows) {
    case kTileRows:
      return choose_strip<kTileRows, T, Operand>(vecs);
    case 4:
      return choose_strip<4, T, Operand>(vecs);
    case 2:
      return choose_strip<2, T, Operand>(vecs);
    default:
      return choose_strip<1, T, Operand>(vecs);
  }
}

}  // namespace detail

// c (+)= a b, with `rows` rows. Columns are visited in the outer loop: the part of b that one register tile reads stays
// in L1 for all strips. `limits` count terms, of which an element of a and a row of b may hold two: a term that shares
// an element with one within the limits is 0.
template <typename T, typename Operand>
__attribute__((noinline)) void gemm(Rows<T> c, Broadcast<Operand> a, Rows<const Operand> b, int rows, int columns,
                                    bool accumulate, const StripLimits& limits) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int vecs = (columns + kLanes - 1) / kLanes;
  const int chunks = (vecs + kTileVecs - 1) / kTileVecs;
  const int chunk = (vecs + chunks - 1) / chunks;
  for (int vec = 0; vec < vecs; vec += chunk) {
    for (int row = 0, strip = 0; row < rows; ++strip) {
      const int height = strip_rows(rows - row);
      const int strip_vecs = (limits.columns[strip] + kLanes - 1) / kLanes;
      const int width = min_of(min_of(chunk, vecs - vec), strip_vecs - vec);
      const int k0 = limits.depth_begin[strip] / kTerms<Operand>;
      const int depth = static_cast<int>(elements_for<Operand>(limits.depth_end[strip])) - k0;
      if (limits.ahead) limits.ahead->step();
      for (int k = 0; width > 0 && k < depth; k += limits.chain) {
        detail::choose_strip<T, Operand>(height, width)(
            c.data + row * c.stride + vec * kLanes, c.stride, a.data + row * a.row_stride + (k0 + k) * a.k_stride,
            a.row_stride, a.k_stride, b.data + (k0 + k) * b.stride + vec * kLanes, b.stride,
            min_of(limits.chain, depth - k), accumulate || k > 0);
      }
      row += height;
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
