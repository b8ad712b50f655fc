// The dropout rule of common/philox.h, 64 columns of one row at a time.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct Dropout {
  uint32_t key0 = 0, key1 = 0, offset = 0, threshold = 0;
  // 1 / (1 - p): what kept values are multiplied by. p = 1 keeps nothing, so its factor may be anything.
  double keep_scale = 1.0;

  // Also where p is so small that the threshold is 0 and nothing is dropped: what is kept is multiplied all the same.
  FASTATTN_INLINE bool active() const { return keep_scale != 1.0; }
  FASTATTN_INLINE uint64_t kept_columns(uint32_t batch_head, uint32_t row, int64_t first_column) const;
};

FASTATTN_INLINE Dropout make_dropout(double dropout_p, const int64_t* rng_state) {
  Dropout dropout;
  if (!(dropout_p > 0.0)) return dropout;
  const uint64_t seed = static_cast<uint64_t>(rng_state[0]);
  dropout.key0 = static_cast<uint32_t>(seed);
  dropout.key1 = static_cast<uint32_t>(seed >> 32);
  dropout.offset = static_cast<uint32_t>(rng_state[1]);
  dropout.threshold = dropout_threshold(dropout_p);
  dropout.keep_scale = dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0;
  return dropout;
}

namespace detail {

// Byte w of `bits`' half g is word w of group g: 8 counters, the draws of 64 columns, hold their words in this order.
FASTATTN_INLINE uint64_t place_word_bits(uint32_t bits, int word) {
  return uint64_t{bits & 0xFFu} << (8 * word) | uint64_t{bits >> 8} << (8 * word + 32);
}

#if defined(__AVX512F__)

// 8 counters, one in the low half of each 64-bit lane. The high halves hold rubbish that no multiplication reads.
FASTATTN_INLINE uint64_t kept_columns_simd(const Dropout& d, uint32_t batch_head, uint32_t row, uint32_t first_group) {
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
  __m512i word0 = _mm512_add_epi64(_mm512_set1_epi64(first_group), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  __m512i word1 = _mm512_set1_epi64(row), word2 = _mm512_set1_epi64(batch_head), word3 = _mm512_set1_epi64(d.offset);
  uint32_t key0 = d.key0, key1 = d.key1;
  constexpr int kXor3 = 0x96;
  unroll<10>([&](auto) __attribute__((always_inline)) {
    const __m512i product0 = _mm512_mul_epu32(multiplier0, word0), product1 = _mm512_mul_epu32(multiplier1, word2);
    word0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), word1, _mm512_set1_epi64(key0), kXor3);
    word2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), word3, _mm512_set1_epi64(key1), kXor3);
    word1 = product1;
    word3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  });
  const __m256i threshold = _mm256_set1_epi16(static_cast<short>(d.threshold));
  const auto kept = [&](__m512i word) __attribute__((always_inline)) {
    return static_cast<uint32_t>(_mm256_cmp_epu16_mask(_mm512_cvtepi64_epi32(word), threshold, _MM_CMPINT_NLT));
  };
  return place_word_bits(kept(word0), 0) | place_word_bits(kept(word1), 1) | place_word_bits(kept(word2), 2) |
         place_word_bits(kept(word3), 3);
}

#elif defined(__AVX2__)

// As above, 4 counters (32 columns) in a register and two registers side by side.
FASTATTN_INLINE uint64_t kept_columns_simd(const Dropout& d, uint32_t batch_head, uint32_t row, uint32_t first_group) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53u), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57u);
  __m256i word0[2], word1[2], word2[2], word3[2];
  unroll<2>(FASTATTN_LAMBDA(g) {
    word0[g] =
        _mm256_add_epi64(_mm256_set1_epi64x(first_group), _mm256_setr_epi64x(4 * g, 4 * g + 1, 4 * g + 2, 4 * g + 3));
    word1[g] = _mm256_set1_epi64x(row);
    word2[g] = _mm256_set1_epi64x(batch_head);
    word3[g] = _mm256_set1_epi64x(d.offset);
  });
  uint32_t key0 = d.key0, key1 = d.key1;
  unroll<10>([&](auto) __attribute__((always_inline)) {
    const __m256i round_key0 = _mm256_set1_epi64x(key0), round_key1 = _mm256_set1_epi64x(key1);
    unroll<2>(FASTATTN_LAMBDA(g) {
      const __m256i product0 = _mm256_mul_epu32(multiplier0, word0[g]);
      const __m256i product1 = _mm256_mul_epu32(multiplier1, word2[g]);
      word0[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), word1[g]), round_key0);
      word2[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), word3[g]), round_key1);
      word1[g] = product1;
      word3[g] = product0;
    });
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  });
  const __m256i threshold = _mm256_set1_epi16(static_cast<short>(d.threshold));
  const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const auto kept = [&](const __m256i(&word)[2]) __attribute__((always_inline)) {
    const __m256i both = _mm256_blend_epi32(_mm256_permutevar8x32_epi32(word[0], low_halves),
                                            _mm256_permutevar8x32_epi32(word[1], low_halves), 0xF0);
    const __m256i keep = _mm256_cmpeq_epi16(_mm256_max_epu16(both, threshold), both);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  };
  return place_word_bits(kept(word0), 0) | place_word_bits(kept(word1), 1) | place_word_bits(kept(word2), 2) |
         place_word_bits(kept(word3), 3);
}

#else

FASTATTN_INLINE uint64_t kept_columns_simd(const Dropout& d, uint32_t batch_head, uint32_t row, uint32_t first_group) {
  uint64_t kept = 0;
  for (uint32_t counter = 0; counter < 8; ++counter) {
    const PhiloxState draw = philox_4x32_10({{first_group + counter, row, batch_head, d.offset}}, d.key0, d.key1);
    for (int word = 0; word < 4; ++word) {
      const uint64_t pair =
          ((draw.word[word] & 0xFFFFu) >= d.threshold ? 1 : 0) | (draw.word[word] >> 16 >= d.threshold ? 2 : 0);
      kept |= pair << (32 * (counter / 4) + 8 * word + 2 * (counter % 4));
    }
  }
  return kept;
}

#endif

}  // namespace detail

// Bit c says whether column first_column + c of the row is kept; first_column is a multiple of 32.
FASTATTN_INLINE uint64_t Dropout::kept_columns(uint32_t batch_head, uint32_t row, int64_t first_column) const {
  if (threshold > 0xFFFFu) return 0;
  return detail::kept_columns_simd(*this, batch_head, row, dropout_group(first_column));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
