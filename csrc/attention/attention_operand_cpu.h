// The form that tensors and probabilities take to be multiplied. A product's left operand is read element by element,
// its right operand in vectors, a row for each term of the sums.
//   T             an element is a term. Rows are padded to whole vectors, which serves on either side.
//   BFloat16Pair  an element is two terms. On the left, rows are bfloat16 as they are; on the right, the rows of terms
//                 2 t and 2 t + 1 are interleaved. A term past the end is 0. Only in the avx512_bf16 build.
#pragma once

#include <type_traits>

#include "attention/attention_pack_cpu.h"
#include "common/bfloat16_pair.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// How many terms of a sum one element of an operand holds.
template <typename Operand>
constexpr int kTerms = 1;
#if defined(__AVX512BF16__)
template <>
inline constexpr int kTerms<BFloat16Pair> = 2;
#endif

template <typename Operand>
FASTATTN_INLINE int64_t elements_for(int64_t terms) {
  return (terms + kTerms<Operand> - 1) / kTerms<Operand>;
}

constexpr int kWholeSum = 1 << 30;

// How many of a sum's terms one chain of multiply-adds takes in a product of rows x columns, where `longest` would do
// for many. Of few rows or columns eager's BLAS forms each sum in many partial sums, which loses far less than a chain.
FASTATTN_INLINE int chain_length(int64_t rows, int64_t columns, int64_t terms, int longest = kWholeSum) {
  const bool few = rows < 4 || columns < 12;
  return !few ? longest : terms <= 32 ? 4 : 8;
}

// Whether rows of `columns` Elements, `stride` apart, are left operands where they are. A power of two between rows
// would put them all into a few sets of L1.
template <typename Operand, typename Element>
FASTATTN_INLINE bool is_left_operand(int64_t stride, int64_t columns) {
  if (stride != columns) return false;
  if constexpr (kTerms<Operand> == 2) return columns % 2 == 0;
  return std::is_same_v<Operand, Element> && columns % Vec<Operand>::kLanes == 0;
}

// The length of a row of a packed left operand.
template <typename Operand>
FASTATTN_INLINE int64_t left_width(int64_t columns) {
  return kTerms<Operand> == 2 ? elements_for<Operand>(columns) : whole_vectors<Operand>(columns);
}

// --- T ---------------------------------------------------------------------------------------------------------------

template <typename T, typename Element>
FASTATTN_INLINE void pack_left(T* dst, int64_t ld, const Element* src, int64_t stride, int rows, int columns) {
  pack_rows(dst, ld, src, stride, rows, columns);
}
template <typename T, typename Rows>
FASTATTN_INLINE void pack_right(T* dst, int64_t ld, const Rows& rows, int count, int columns) {
  pack_rows(dst, ld, rows, count, columns);
}

#if defined(__AVX512BF16__)

// --- Pairs -----------------------------------------------------------------------------------------------------------

namespace detail {

FASTATTN_INLINE __mmask32 first_words(int n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << max_of(n, 0)) - 1; }

}  // namespace detail

// dst[t * kTileKeys + key] = rows[key][2 t, 2 t + 1]; keys from `keys` on are 0.
template <typename Rows>
FASTATTN_INLINE void pack_keys(BFloat16Pair* dst, const Rows& rows, int keys, int depth) {
  constexpr int kLanes = Vec<BFloat16Pair>::kLanes;
  const int pairs = (depth + 1) / 2;
  for (int key = 0; key < kTileKeys; key += kLanes) {
    for (int pair = 0; pair < pairs; pair += kLanes) {
      const __mmask32 present = detail::first_words(depth - 2 * pair);
      // The shuffles move 32 bits at a time and do not care what they are.
      Vec<float> block[kLanes];
      unroll<kLanes>(FASTATTN_LAMBDA(i) {
        const __mmask32 mask = key + i < keys ? present : 0;
        block[i].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows[key + i] + 2 * pair));
      });
      detail::transpose(block);
      unroll<kLanes>(FASTATTN_LAMBDA(i) {
        if (pair + i < pairs) _mm512_storeu_ps(dst + (pair + i) * kTileKeys + key, block[i].v);
      });
    }
  }
}

FASTATTN_INLINE void pack_left(BFloat16Pair* dst, int64_t ld, const BFloat16* src, int64_t stride, int rows,
                               int columns) {
  for (int row = 0; row < rows; ++row, dst += ld, src += stride) {
    for (int c = 0; c < columns; c += 32) {
      const __m512i x = _mm512_maskz_loadu_epi16(detail::first_words(columns - c), src + c);
      _mm512_mask_storeu_epi32(dst + c / 2, Vec<float>::first_lanes((columns - c + 1) / 2), x);
    }
  }
}

template <typename Rows>
FASTATTN_INLINE void pack_right(BFloat16Pair* dst, int64_t ld, const Rows& rows, int count, int columns) {
  for (int row = 0; row < count; row += 2, dst += ld) {
    const bool is_pair = row + 1 < count;
    const BFloat16 *first_row = rows[row], *second_row = rows[is_pair ? row + 1 : row];
    for (int c = 0; c < columns; c += Vec<BFloat16Pair>::kLanes) {
      const __mmask16 present = Vec<float>::first_lanes(columns - c);
      const __mmask16 second_present = is_pair ? present : 0;
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, first_row + c));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second_present, second_row + c));
      Vec<BFloat16Pair>{_mm512_or_si512(first, _mm512_slli_epi32(second, 16))}.store(dst + c);
    }
  }
}

#endif

// The same of rows at src, `stride` apart.
template <typename Operand, typename Element>
FASTATTN_INLINE void pack_right(Operand* dst, int64_t ld, const Element* src, int64_t stride, int rows, int columns) {
  pack_right(dst, ld, StridedRows<Element>{src, stride}, rows, columns);
}

// --- Tiles that were computed: `rows` x kTileKeys of T ---------------------------------------------------------------

// Neighbours along a row of a left operand.
template <typename T>
FASTATTN_INLINE void store_left(T* dst, Vec<T> x) {
  x.store(dst);
}

// The tile as a left operand whose terms are its keys, kTileKeys / kTerms elements a row. T stays where it is.
template <typename T>
FASTATTN_INLINE const T* left_over_keys(T*, const T* tile, int) {
  return tile;
}
// The tile's transpose as a left operand, whose terms are the tile's rows: that of (key, row) is at
// [row / kTerms * kTileKeys + key].
template <typename T>
FASTATTN_INLINE const T* left_over_rows(T*, const T* tile, int) {
  return tile;
}

#if defined(__AVX512BF16__)

FASTATTN_INLINE void store_left(BFloat16Pair* dst, Vec<float> x) {
  _mm256_storeu_si256((__m256i*)dst, (__m256i)_mm512_cvtneps_pbh(x.v));
}

FASTATTN_INLINE const BFloat16Pair* left_over_keys(BFloat16Pair* dst, const float* tile, int rows) {
  for (int at = 0; at < rows * kTileKeys; at += Vec<float>::kLanes) {
    store_left(dst + at / 2, Vec<float>::load(tile + at));
  }
  return dst;
}

FASTATTN_INLINE const BFloat16Pair* left_over_rows(BFloat16Pair* dst, const float* tile, int rows) {
  using V = Vec<float>;
  for (int row = 0; row < rows; row += 2) {
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      const float* first = tile + row * kTileKeys + key;
      const V second = row + 1 < rows ? V::load(first + kTileKeys) : V::zero();
      round_to_pairs(V::load(first), second).store(dst + row / 2 * kTileKeys + key);
    }
  }
  return dst;
}

#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
