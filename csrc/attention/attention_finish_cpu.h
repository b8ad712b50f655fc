// The end of forward attention's running softmax: sink, division, log-sum-exp, and the row written out.
#pragma once

#include <limits>

#include "attention/attention.h"
#include "attention/attention_pack_cpu.h"
#include "attention/packed.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A finished pass over some keys: sum is of e^(score - largest), and the row's output is scaled alike.
struct RowStatistics {
  double largest = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

template <typename Element>
FASTATTN_INLINE Element* head_of(const AttentionTensor& t, int64_t batch, int64_t head) {
  return static_cast<Element*>(t.data) + batch * t.stride_batch + head * t.stride_head;
}

template <typename T, typename Element>
FASTATTN_INLINE void store_row(Element* dst, const T* src, int columns, T factor) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  const int whole = columns / V::kLanes * V::kLanes;
  for (int c = 0; c < whole; c += V::kLanes) (V::load(src + c) * scale).store_as(dst + c);
  if (whole < columns) (V::load(src + whole) * scale).store_as_partial(dst + whole, columns - whole);
}

// Writes row `row` of (batch, head): out and lse. src may be overwritten.
template <typename T, typename Element>
FASTATTN_INLINE void finish_row(const AttentionParams& p, int64_t batch, int64_t head, int64_t row,
                                RowStatistics row_is, double keep_scale, T* src) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double factor = keep_scale;
  if (row_is.sum == 0) {
    // A row that saw nothing is 0, whatever the values hold.
    for (int64_t c = 0; c < whole_vectors<T>(p.head_dim_v); ++c) src[c] = 0;
    factor = 0;
  }
  double largest = row_is.largest, sum = row_is.sum;
  if (p.sinks) {
    // One more logit without a value.
    const double sink = static_cast<double>(static_cast<const T*>(p.sinks)[head]);
    const double both = max_of(largest, sink);
    if (both > -kInfinity) {
      const double rescale = __builtin_exp(largest - both);
      sum = sum * rescale + __builtin_exp(sink - both);
      factor *= rescale;
      largest = both;
    }
  }
  T* lse = static_cast<T*>(p.lse) + lse_offset(p, batch, head);
  lse[row] = static_cast<T>(sum == 0 ? -kInfinity : largest + __builtin_log(sum));
  store_row(head_of<Element>(p.out, batch, head) + row * p.out.stride_row, src, static_cast<int>(p.head_dim_v),
            static_cast<T>(sum == 0 ? 0 : factor / sum));
}

// m of x = m * 2^exponent with m in [sqrt(1/2), sqrt(2)), for normal x > 0.
FASTATTN_INLINE Vec<float> split_exponent(Vec<float> x, Vec<float>& exponent) {
  // From this number's bits on, each step of 2^23 is one power of two.
  constexpr int32_t kRootHalf = 0x3F3504F3, kMantissa = 0x7FFFFF;
#if defined(__AVX512F__)
  const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(kRootHalf));
  exponent.v = _mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 23));
  const __m512i mantissa = _mm512_and_si512(bits, _mm512_set1_epi32(kMantissa));
  return {_mm512_castsi512_ps(_mm512_add_epi32(mantissa, _mm512_set1_epi32(kRootHalf)))};
#elif defined(__AVX2__)
  const __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(kRootHalf));
  exponent.v = _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(kMantissa));
  return {_mm256_castsi256_ps(_mm256_add_epi32(mantissa, _mm256_set1_epi32(kRootHalf)))};
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(x.v[i])) - kRootHalf;
    exponent.v[i] = static_cast<float>(bits >> 23);
    x.v[i] = bits_to_float(static_cast<uint32_t>((bits & kMantissa) + kRootHalf));
  }
  return x;
#endif
}

// largest + log(sum) for sums that are normal and no NaN, rounded about once: what the first sum of two numbers of any
// size rounds away is added to the small terms. With sum = m 2^e, f = m - 1 and s = f / (2 + f) it is
// log(m) = 2 atanh(s) = f - s (f - s^2 (2/3 + 2/5 s^2 + ...)), where s^2 < 0.03.
FASTATTN_INLINE Vec<float> log_sum(Vec<float> largest, Vec<float> sum) {
  using V = Vec<float>;
  V exponent;
  const V f = split_exponent(sum, exponent) - V::set1(1);
  const V s = f / (f + V::set1(2)), square = s * s;
  V series = V::set1(2.0f / 9);
  series = fma(series, square, V::set1(2.0f / 7));
  series = fma(series, square, V::set1(2.0f / 5));
  series = fma(series, square, V::set1(2.0f / 3));
  const V log_mantissa = fnma(s, fnma(series, square, f), f);
  // e ln 2 in two parts, of which the first has so few bits that its product is exact.
  const V high = exponent * V::set1(0.693359375f);
  const V total = largest + high, of_high = total - largest;
  const V rounded_away = (largest - (total - of_high)) + (high - of_high);
  return total + (rounded_away + fma(exponent, V::set1(-2.12194440e-4f), log_mantissa));
}

// finish_row of `count` <= kLanes rows from `row` on, if nothing about them is unusual; false: nothing was written.
// row_sum: kLanes parts of each row's sum. src: `columns` a row.
template <typename T, typename Element>
FASTATTN_INLINE bool finish_usual_rows(const AttentionParams& p, int64_t batch, int64_t head, int64_t row, int count,
                                       const T* row_max, const T* row_sum, double keep_scale, const T* src,
                                       int64_t columns) {
  // Vec<double> is there to be exact.
  if constexpr (!std::is_same_v<T, float>) return false;
  if constexpr (std::is_same_v<T, float>) {
    using V = Vec<T>;
    if (p.sinks) return false;
    V parts[V::kLanes];
    unroll<V::kLanes>(FASTATTN_LAMBDA(i) { parts[i] = i < count ? V::load(row_sum + i * V::kLanes) : V::set1(1); });
    detail::transpose(parts);
    for (int half = V::kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
    }
    const V sum = parts[0];
    const auto is_large = less(V::set1(0x1p-100f), sum), is_small = less(sum, V::set1(0x1p100f));
    const V usual = select(is_large, select(is_small, V::set1(1), V::zero()), V::zero());
    if (usual.reduce_add() != V::kLanes) return false;
    T* lse = static_cast<T*>(p.lse) + lse_offset(p, batch, head);
    log_sum(V::load_partial(row_max, count), sum).store_partial(lse + row, count);
    T factors[V::kLanes];
    (V::set1(static_cast<T>(keep_scale)) / sum).store(factors);
    Element* out = head_of<Element>(p.out, batch, head) + row * p.out.stride_row;
    for (int r = 0; r < count; ++r) {
      store_row(out + r * p.out.stride_row, src + r * columns, static_cast<int>(p.head_dim_v), factors[r]);
    }
    return true;
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
