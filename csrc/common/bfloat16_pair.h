// Pairs of bfloat16, which vdpbf16ps multiplies and adds up in fp32: two terms of a sum for each of fp32's one. Only in
// the avx512_bf16 build. The instruction takes subnormal numbers for zero; bfloat16 has none above 1.2e-38.
#pragma once

#include "common/simd.h"

#if defined(__AVX512BF16__)

namespace fastattn {
namespace FASTATTN_ISA {

// Two neighbours in a sum of products, the first in the low half. May be read from memory written as BFloat16.
struct __attribute__((packed, may_alias)) BFloat16Pair {
  uint32_t bits;
};

template <>
struct Vec<BFloat16Pair> {
  static constexpr int kLanes = 16;
  __m512i v;

  static FASTATTN_INLINE Vec zero() { return {_mm512_setzero_si512()}; }
  static FASTATTN_INLINE Vec set1(BFloat16Pair x) { return {_mm512_set1_epi32(static_cast<int>(x.bits))}; }
  static FASTATTN_INLINE Vec load_as(const BFloat16Pair* p) { return {_mm512_loadu_si512(p)}; }
  FASTATTN_INLINE void store(BFloat16Pair* p) const { _mm512_storeu_si512(p, v); }
  // c + a.first * b.first + a.second * b.second
  friend FASTATTN_INLINE Vec<float> fma(Vec a, Vec b, Vec<float> c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};

// Lane l is the pair (first[l], second[l]).
FASTATTN_INLINE Vec<BFloat16Pair> round_to_pairs(Vec<float> first, Vec<float> second) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both)};
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#endif
