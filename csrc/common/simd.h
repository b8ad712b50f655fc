// Vectors for the CPU kernels: Vec<float> and Vec<double>, as wide as the instruction set that this file is compiled
// for. Everything lives in namespace FASTATTN_ISA (isa_portable, isa_avx2, isa_avx512, isa_avx512_bf16) and is forced
// inline: all builds of these names are linked into one library, and code of one must never end up serving another. For
// the same reason the *_cpu.cpp files use no out-of-line templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTATTN_ISA
#error "compile *_cpu.cpp with -DFASTATTN_ISA=isa_<name>; setup.py does"
#endif

#define FASTATTN_INLINE inline __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {

// f(0), f(1), ... f(kCount - 1) with compile-time indices. GCC keeps an array of accumulators in registers only when
// every index is a constant: a loop, even under `#pragma GCC unroll`, leaves it on the stack and halves the speed.
template <int kCount, typename Fn>
FASTATTN_INLINE void unroll(Fn&& fn) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}
// Lambdas passed to unroll: `unroll<4>(FASTATTN_LAMBDA(row) { ... })`.
#define FASTATTN_LAMBDA(index) [&](auto index) __attribute__((always_inline))

template <typename T>
FASTATTN_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FASTATTN_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

// --- 16-bit elements, one at a time ---------------------------------------------------------------------------------

FASTATTN_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
FASTATTN_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTATTN_INLINE float to_float(float x) { return x; }
FASTATTN_INLINE double to_float(double x) { return x; }
FASTATTN_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
FASTATTN_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shifting exponent and mantissa into a float and multiplying by 2^112 rebiases normals and subnormals alike.
  const float magnitude = bits_to_float((x.bits & 0x7FFFu) << 13) * 0x1p112f;
  const bool finite = (x.bits & 0x7C00u) != 0x7C00u;
  const uint32_t bits = finite ? float_to_bits(magnitude) : ((x.bits & 0x7FFFu) << 13) | 0x7F800000u;
  return bits_to_float(bits | (x.bits & 0x8000u) << 16);
#endif
}

template <typename T>
T from_float(float x);
template <>
FASTATTN_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FASTATTN_INLINE double from_float<double>(float x) {
  return x;
}
template <>
FASTATTN_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
template <>
FASTATTN_INLINE Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u;
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7FFFFFFFu);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x1p-14f) {
    // Adding 0.5 aligns the last kept bit of a subnormal (2^-24) with the last bit of the sum, which rounds to even.
    return {static_cast<uint16_t>(sign | (float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f)))};
  }
  const uint32_t bits = float_to_bits(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xFFFu + (bits >> 13 & 1u)) >> 13)};
#endif
}

// --- Vectors --------------------------------------------------------------------------------------------------------
// Vec<T> has kLanes elements of T, and these operations:
//   zero() set1(x) iota() load(p) store(p) load_partial(p, n) store_partial(p, n)   n lanes, the others read as 0
//   load_as(p) store_as(p) and _partial forms, converting from and to float, BFloat16, Float16 (double for Vec<double>)
//   + - * / fma(a, b, c) = a*b+c  fnma(a, b, c) = c-a*b  min max abs sqrt reduce_add reduce_max
//   less(a, b), less_equal(a, b) -> Mask;  select(mask, a, b) = mask ? a : b;  first_lanes(n) -> Mask;
//   mask_from_bits(bits): lane l is set if bit l of the uint32_t is

template <typename T>
struct Vec;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  __m512 v;

  static FASTATTN_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static FASTATTN_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static FASTATTN_INLINE Vec iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  static FASTATTN_INLINE Mask first_lanes(int n) {
    return n >= 16 ? 0xFFFF : static_cast<Mask>((1u << max_of(n, 0)) - 1);
  }
  static FASTATTN_INLINE Mask mask_from_bits(uint32_t bits) { return static_cast<Mask>(bits); }

  static FASTATTN_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FASTATTN_INLINE Vec load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
  static FASTATTN_INLINE Vec load_as(const float* p) { return load(p); }
  static FASTATTN_INLINE Vec load_as(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static FASTATTN_INLINE Vec load_as(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  static FASTATTN_INLINE Vec load_as_partial(const float* p, int n) { return load_partial(p, n); }
  static FASTATTN_INLINE Vec load_as_partial(const BFloat16* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  static FASTATTN_INLINE Vec load_as_partial(const Float16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
  }
  FASTATTN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FASTATTN_INLINE void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  FASTATTN_INLINE void store_as(float* p) const { store(p); }
  FASTATTN_INLINE void store_as(BFloat16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16()); }
  FASTATTN_INLINE void store_as(Float16* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
  FASTATTN_INLINE void store_as_partial(float* p, int n) const { store_partial(p, n); }
  FASTATTN_INLINE void store_as_partial(BFloat16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16());
  }
  FASTATTN_INLINE void store_as_partial(Float16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, 0));
  }

  static FASTATTN_INLINE Vec widen_bf16(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  FASTATTN_INLINE __m256i narrow_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
  }

  friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend FASTATTN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  friend FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend FASTATTN_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  friend FASTATTN_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
  friend FASTATTN_INLINE Mask less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
  friend FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.v, m, a.v)}; }
  FASTATTN_INLINE float reduce_add() const { return _mm512_reduce_add_ps(v); }
  FASTATTN_INLINE float reduce_max() const { return _mm512_reduce_max_ps(v); }
};
FASTATTN_INLINE bool any(Vec<float>::Mask m) { return m != 0; }

#elif defined(__AVX2__)

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  using Mask = __m256;
  __m256 v;

  static FASTATTN_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static FASTATTN_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static FASTATTN_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static FASTATTN_INLINE __m256i lane_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTATTN_INLINE Mask first_lanes(int n) { return _mm256_castsi256_ps(lane_mask(n)); }
  static FASTATTN_INLINE Mask mask_from_bits(uint32_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit), lane_bit));
  }

  static FASTATTN_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FASTATTN_INLINE Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
  static FASTATTN_INLINE Vec load_as(const float* p) { return load(p); }
  static FASTATTN_INLINE Vec load_as(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static FASTATTN_INLINE Vec load_as(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static FASTATTN_INLINE Vec load_as_partial(const float* p, int n) { return load_partial(p, n); }
  template <typename Element>
  static FASTATTN_INLINE Vec load_as_partial(const Element* p, int n) {
    Element lanes[kLanes] = {};
    for (int i = 0; i < n && i < kLanes; ++i) lanes[i] = p[i];
    return load_as(lanes);
  }
  FASTATTN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTATTN_INLINE void store_partial(float* p, int n) const { _mm256_maskstore_ps(p, lane_mask(n), v); }
  FASTATTN_INLINE void store_as(float* p) const { store(p); }
  FASTATTN_INLINE void store_as(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((__m128i*)p, packed);
  }
  FASTATTN_INLINE void store_as(Float16* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
  FASTATTN_INLINE void store_as_partial(float* p, int n) const { store_partial(p, n); }
  template <typename Element>
  FASTATTN_INLINE void store_as_partial(Element* p, int n) const {
    Element lanes[kLanes];
    store_as(lanes);
    for (int i = 0; i < n && i < kLanes; ++i) p[i] = lanes[i];
  }

  friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend FASTATTN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  friend FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend FASTATTN_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend FASTATTN_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  friend FASTATTN_INLINE Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
  friend FASTATTN_INLINE Mask less_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ); }
  friend FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
  FASTATTN_INLINE float reduce_add() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  FASTATTN_INLINE float reduce_max() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
  }
};
FASTATTN_INLINE bool any(Vec<float>::Mask m) { return _mm256_movemask_ps(m) != 0; }

#endif

// The portable build, and Vec<double> in every build: compiler vectors, which become SSE2 or NEON where there is
// either. Vec<double> serves gradcheck, where exactness counts and speed does not.
namespace detail {

template <typename T, int kLanes_>
struct PortableVec {
  static constexpr int kLanes = kLanes_;
  typedef T Native __attribute__((vector_size(kLanes_ * sizeof(T))));
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits Mask __attribute__((vector_size(kLanes_ * sizeof(T))));
  using Self = Vec<T>;
  Native v;

  static FASTATTN_INLINE Self zero() { return set1(0); }
  // A difference because a scalar in one goes to all lanes, and x - 0 is x, also where x is -0. Of a loop over lanes
  // GCC makes eleven instructions where one does.
  static FASTATTN_INLINE Self set1(T x) { return make(x - Native{}); }
  static FASTATTN_INLINE Self iota() {
    Self r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<T>(i);
    return r;
  }
  static FASTATTN_INLINE Mask first_lanes(int n) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m[i] = i < n ? -1 : 0;
    return m;
  }
  static FASTATTN_INLINE Mask mask_from_bits(uint32_t bits) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m[i] = -static_cast<Bits>(bits >> i & 1u);
    return m;
  }
  static FASTATTN_INLINE Self load(const T* p) {
    Self r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  FASTATTN_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof v); }
  template <typename Element>
  static FASTATTN_INLINE Self load_as(const Element* p) {
    Self r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<T>(to_float(p[i]));
    return r;
  }
  template <typename Element>
  static FASTATTN_INLINE Self load_as_partial(const Element* p, int n) {
    Self r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = i < n ? static_cast<T>(to_float(p[i])) : T(0);
    return r;
  }
  static FASTATTN_INLINE Self load_partial(const T* p, int n) { return load_as_partial(p, n); }
  template <typename Element>
  FASTATTN_INLINE void store_as_partial(Element* p, int n) const {
    for (int i = 0; i < kLanes && i < n; ++i) {
      if constexpr (std::is_same_v<Element, T>) {
        p[i] = v[i];
      } else {
        p[i] = from_float<Element>(static_cast<float>(v[i]));
      }
    }
  }
  template <typename Element>
  FASTATTN_INLINE void store_as(Element* p) const {
    store_as_partial(p, kLanes);
  }
  FASTATTN_INLINE void store_partial(T* p, int n) const { store_as_partial(p, n); }

  friend FASTATTN_INLINE Self operator+(Self a, Self b) { return make(a.v + b.v); }
  friend FASTATTN_INLINE Self operator-(Self a, Self b) { return make(a.v - b.v); }
  friend FASTATTN_INLINE Self operator*(Self a, Self b) { return make(a.v * b.v); }
  friend FASTATTN_INLINE Self operator/(Self a, Self b) { return make(a.v / b.v); }
  friend FASTATTN_INLINE Self fma(Self a, Self b, Self c) { return make(a.v * b.v + c.v); }
  friend FASTATTN_INLINE Self fnma(Self a, Self b, Self c) { return make(c.v - a.v * b.v); }
  friend FASTATTN_INLINE Self min(Self a, Self b) { return make(a.v < b.v ? a.v : b.v); }
  friend FASTATTN_INLINE Self max(Self a, Self b) { return make(a.v > b.v ? a.v : b.v); }
  friend FASTATTN_INLINE Self abs(Self a) { return make(a.v < 0 ? -a.v : a.v); }
  friend FASTATTN_INLINE Self sqrt(Self a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = sizeof(T) == 4 ? __builtin_sqrtf(a.v[i]) : __builtin_sqrt(a.v[i]);
    return a;
  }
  friend FASTATTN_INLINE Mask less(Self a, Self b) { return a.v < b.v; }
  friend FASTATTN_INLINE Mask less_equal(Self a, Self b) { return a.v <= b.v; }
  friend FASTATTN_INLINE Self select(Mask m, Self a, Self b) { return make(m ? a.v : b.v); }
  FASTATTN_INLINE T reduce_add() const {
    T sum = v[0];
    for (int i = 1; i < kLanes; ++i) sum += v[i];
    return sum;
  }
  FASTATTN_INLINE T reduce_max() const {
    T largest = v[0];
    for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
  }

 private:
  static FASTATTN_INLINE Self make(Native native) {
    Self r;
    r.v = native;
    return r;
  }
};

}  // namespace detail

#if !defined(__AVX2__)
template <>
struct Vec<float> : detail::PortableVec<float, 4> {};
FASTATTN_INLINE bool any(Vec<float>::Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
#endif

template <>
struct Vec<double> : detail::PortableVec<double, 2> {};
FASTATTN_INLINE bool any(Vec<double>::Mask m) { return (m[0] | m[1]) != 0; }

// --- exp2, exp, tanh ------------------------------------------------------------------------------------------------

namespace detail {

// polynomial * 2^n, where n was rounded into the low mantissa bits of `shifted`; 0 where x < smallest. NaN in x
// survives: it is not less than anything.
FASTATTN_INLINE Vec<float> times_power_of_two(Vec<float> polynomial, Vec<float> shifted, Vec<float> x, float smallest) {
#if defined(__AVX512F__)
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  const __mmask16 kept = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
  return {_mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(polynomial.v), exponent))};
#elif defined(__AVX2__)
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(polynomial.v), exponent));
  return {_mm256_and_ps(scaled, _mm256_cmp_ps(x.v, _mm256_set1_ps(smallest), _CMP_NLT_UQ))};
#else
  Vec<float> result;
  for (int i = 0; i < Vec<float>::kLanes; ++i) {
    const float scaled = bits_to_float(float_to_bits(polynomial.v[i]) + (float_to_bits(shifted.v[i]) << 23));
    result.v[i] = x.v[i] < smallest ? 0.0f : scaled;
  }
  return result;
#endif
}

}  // namespace detail

// 2^x for x <= 127; below -126 the result is 0. Error < 1 ulp in float (minimax of degree 6 on [-0.5, 0.5]).
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  // max returns its second operand if one is NaN: the order lets NaN through.
  const V clamped = max(V::set1(-127.0f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
  const V magic = V::set1(12582912.0f);
  const V shifted = clamped + magic;
  const V fraction = clamped - (shifted - magic);
  V p = V::set1(1.5353362e-4f);
  p = fma(p, fraction, V::set1(1.3398874e-3f));
  p = fma(p, fraction, V::set1(9.6184369e-3f));
  p = fma(p, fraction, V::set1(5.5503324e-2f));
  p = fma(p, fraction, V::set1(2.4022648e-1f));
  p = fma(p, fraction, V::set1(6.9314718e-1f));
  p = fma(p, fraction, V::set1(1.0f));
  return detail::times_power_of_two(p, shifted, x, -126.0f);
}

FASTATTN_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_exp2(x.v[i]);
  return x;
}

// e^x for x <= 88; below -87.33 (e^x < 2^-126) the result is 0. Error < 1 ulp in float for |x| < 20, < 5 ulp elsewhere:
// fl(ln 2) is off by 1.9e-9, and n = round(x / ln 2) times that is what the reduction loses.
FASTATTN_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V clamped = max(V::set1(-88.0f), x);
  const V magic = V::set1(12582912.0f);
  const V shifted = fma(clamped, V::set1(1.44269504f), magic);
  const V n = shifted - magic;
#if defined(__FMA__)
  const V fraction = fnma(n, V::set1(0.693147182f), clamped);
#else
  // Without a fused subtraction n * ln 2 would round; 355/512 has so few bits that n * 355/512 does not.
  const V fraction = fnma(n, V::set1(-2.12194440e-4f), fnma(n, V::set1(0.693359375f), clamped));
#endif
  V p = V::set1(1.3814599e-3f);
  p = fma(p, fraction, V::set1(8.3687166e-3f));
  p = fma(p, fraction, V::set1(4.1668389e-2f));
  p = fma(p, fraction, V::set1(1.6666521e-1f));
  p = fma(p, fraction, V::set1(4.9999994e-1f));
  p = fma(p, fraction, V::set1(1.0f));
  p = fma(p, fraction, V::set1(1.0f));
  return detail::times_power_of_two(p, shifted, x, -87.33f);
}

FASTATTN_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_exp(x.v[i]);
  return x;
}

// Near 0, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial (minimax on [-0.625, 0.625]). Error < 3 ulp in
// float.
FASTATTN_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V size = abs(x);
  // min returns its second operand if one is NaN.
  const V power = exp(min(V::set1(20.0f), size + size));
  const V large = V::set1(1.0f) - V::set1(2.0f) / (power + V::set1(1.0f));
  const V square = x * x;
  V p = V::set1(-5.7049873e-3f);
  p = fma(p, square, V::set1(2.0639088e-2f));
  p = fma(p, square, V::set1(-5.3739715e-2f));
  p = fma(p, square, V::set1(1.3331442e-1f));
  p = fma(p, square, V::set1(-3.3333281e-1f));
  const V small = fma(p * square, x, x);
  return select(less(size, V::set1(0.625f)), small, select(less(x, V::zero()), V::zero() - large, large));
}

FASTATTN_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = __builtin_tanh(x.v[i]);
  return x;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
