// Quantises one row:  scale = max |x| / 127,  q = round_to_even(x * (1 / scale)).
// Numbers: a zero row gives q = 0, scale = 1. The scale is at least 2^-126, so that its reciprocal is finite. A row
//          that holds NaN or infinity gives q = 0 and scale = NaN: whatever is computed from it is NaN, never silently
//          clipped. |q| <= 127 without clamping: scale and reciprocal are rounded once each, so
//          x * (1 / scale) < 127.5.
#pragma once

#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// q[0, n) = round_to_even(x), for n <= Vec<float>::kLanes; |x| < 128.
FASTATTN_INLINE void store_int8(Vec<float> x, int8_t* q, int n) {
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi8(q, Vec<float>::first_lanes(n), _mm512_cvtps_epi32(x.v));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(half, half));
  if (n >= 8) {
    std::memcpy(q, &bytes, 8);
  } else {
    std::memcpy(q, &bytes, static_cast<size_t>(n));
  }
#else
  for (int i = 0; i < n && i < Vec<float>::kLanes; ++i) q[i] = static_cast<int8_t>(__builtin_lrintf(x.v[i]));
#endif
}

// The scale of a row: 1 for zeros, NaN for one that is not finite.
template <typename Element>
FASTATTN_INLINE float row_scale(const Element* x, int64_t depth) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  V largest[4], poison[4];
  unroll<4>(FASTATTN_LAMBDA(i) { largest[i] = poison[i] = V::zero(); });
  int64_t k = 0;
  for (; k + 4 * kLanes <= depth; k += 4 * kLanes) {
    unroll<4>(FASTATTN_LAMBDA(i) {
      const V value = V::load_as(x + k + i * kLanes);
      largest[i] = max(largest[i], abs(value));
      // max() may drop a NaN; 0 * NaN and 0 * infinity cannot be lost again.
      poison[i] = fma(value, V::zero(), poison[i]);
    });
  }
  for (; k < depth; k += kLanes) {
    const V value = V::load_as_partial(x + k, static_cast<int>(min_of<int64_t>(depth - k, kLanes)));
    largest[0] = max(largest[0], abs(value));
    poison[0] = fma(value, V::zero(), poison[0]);
  }
  const float amax = max(max(largest[0], largest[1]), max(largest[2], largest[3])).reduce_max();
  const bool finite = ((poison[0] + poison[1]) + (poison[2] + poison[3])).reduce_add() == 0.0f;
  if (!finite) return __builtin_nanf("");
  return amax == 0.0f ? 1.0f : max_of(amax / 127.0f, 0x1p-126f);
}

template <typename Element>
FASTATTN_INLINE float quantize_row(const Element* x, int64_t depth, int8_t* q) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  const float scale = row_scale(x, depth);
  if (scale != scale) {
    std::memset(q, 0, static_cast<size_t>(depth));
    return scale;
  }
  const V inverse = V::set1(1.0f / scale);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store_int8(V::load_as(x + k) * inverse, q + k, kLanes);
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
    store_int8(V::load_as_partial(x + k, rest) * inverse, q + k, rest);
  }
  return scale;
}

// fn(element) with a value of the type that dtype names: kFloat32, kBFloat16 or kFloat16.
template <typename Fn>
FASTATTN_INLINE void dispatch_element(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(BFloat16{});
    case DType::kFloat16:
      return fn(Float16{});
    default:
      return fn(float{});
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
