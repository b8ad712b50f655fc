// The register tile under every matrix product of the CPU kernels.
#pragma once

#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// How many accumulator rows and vectors fit the register file beside one row of B and a broadcast:
// AVX-512 has 32 registers (6x4 + 4 + 1 = 29), AVX2 and SSE2 16 (6x2 + 2 + 1 = 15).
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
#else
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;
#endif

// acc[r][v] += sum over k < depth of a[r * a_row_stride + k * a_k_stride] * b[k * ldb + v * kLanes ...]
// A is broadcast element by element (from L1 that is nearly free), B is read in vectors, and converted if it is not of
// A's type. That is T, or BFloat16Pair, with which k counts pairs of terms.
template <int kRows, int kVecs, typename T, typename A, typename B>
FASTATTN_INLINE void gemm_tile(Vec<T> (&acc)[kRows][kVecs], const A* a, int64_t a_row_stride, int64_t a_k_stride,
                               const B* b, int64_t ldb, int depth) {
  for (int k = 0; k < depth; ++k) {
    Vec<A> b_row[kVecs];
    unroll<kVecs>(FASTATTN_LAMBDA(v) { b_row[v] = Vec<A>::load_as(b + v * Vec<A>::kLanes); });
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const Vec<A> a_value = Vec<A>::set1(a[r * a_row_stride]);
      unroll<kVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = fma(a_value, b_row[v], acc[r][v]); });
    });
    a += a_k_stride;
    b += ldb;
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
