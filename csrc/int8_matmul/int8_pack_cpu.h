// The two operand layouts that dot_tile reads: panels of 32 columns of B, panels of kTileRows rows of A.
#pragma once

#include "common/simd.h"
#include "int8_matmul/int8_dot_cpu.h"
#include "int8_matmul/quantize_int8_cpu.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Four neighbours in k of one row; past the end of the row they are 0.
FASTATTN_INLINE uint32_t load_group(const int8_t* row, int64_t k, int64_t depth) {
  uint32_t group = 0;
  if (k + kGroupDepth <= depth) {
    std::memcpy(&group, row + k, 4);
  } else {
    for (int64_t i = 0; k + i < depth; ++i) group |= uint32_t{static_cast<uint8_t>(row[k + i])} << (8 * i);
  }
  return group;
}

// Transposes 16 rows of 16 groups: group g of row r goes to target + g * kPanelColumnGroup + r * 4.
#if defined(__AVX512F__)
inline void transpose_groups(const int8_t* rows, int64_t stride, int8_t* target) {
  __m512i r[16], pairs[16], quads[16];
  unroll<16>(FASTATTN_LAMBDA(i) { r[i] = _mm512_loadu_si512(rows + i * stride); });
  unroll<8>(FASTATTN_LAMBDA(i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  });
  // 128-bit lane l of quads[4 * i + j] holds group 4 * l + j of rows 4 * i to 4 * i + 3.
  unroll<4>(FASTATTN_LAMBDA(i) {
    quads[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    quads[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unroll<4>(FASTATTN_LAMBDA(j) {
    const __m512i even_low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xDD);
    _mm512_storeu_si512(target + j * kPanelColumnGroup, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(target + (4 + j) * kPanelColumnGroup, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(target + (8 + j) * kPanelColumnGroup, _mm512_shuffle_i32x4(even_low, even_high, 0xDD));
    _mm512_storeu_si512(target + (12 + j) * kPanelColumnGroup, _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD));
  });
}
#else
inline void transpose_groups(const int8_t* rows, int64_t stride, int8_t* target) {
  for (int64_t r = 0; r < 16; ++r) {
    for (int64_t g = 0; g < 16; ++g) {
      std::memcpy(target + g * kPanelColumnGroup + r * kGroupDepth, rows + r * stride + g * kGroupDepth, kGroupDepth);
    }
  }
}
#endif

// panel[g][c][0..4) = b[c][4g..4g+4) for `columns` (1 to 32) rows of b, zero elsewhere.
inline void pack_b_panel(const int8_t* b, int64_t stride_b, int64_t columns, int64_t depth, int8_t* panel) {
  const int64_t groups = int8_groups(depth);
  // Several groups a visit: a cache line of each row serves 16 of them.
  constexpr int64_t kVisit = 16;
  for (int64_t first = 0; first < groups; first += kVisit) {
    const int64_t last = min_of(first + kVisit, groups);
    int8_t* target = panel + first * kPanelColumnGroup;
    if (columns == kPanelColumns && (first + kVisit) * kGroupDepth <= depth) {
      transpose_groups(b + first * kGroupDepth, stride_b, target);
      transpose_groups(b + first * kGroupDepth + 16 * stride_b, stride_b, target + 64);
      continue;
    }
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      for (int64_t g = first; g < last; ++g) {
        const uint32_t group = c < columns ? load_group(b + c * stride_b, g * kGroupDepth, depth) : 0;
        std::memcpy(target + (g - first) * kPanelColumnGroup + c * kGroupDepth, &group, 4);
      }
    }
  }
}

// -128 * sum over k of the panel, per column: undoes the 128 that is added to A for VNNI (see int8_dot_cpu.h).
inline void panel_compensation(const int8_t* panel, int64_t depth, int32_t* compensation) {
  constexpr Dot::A kOnes[kGroupDepth] = {1, 1, 1, 1};
  constexpr int64_t kColumns = Dot::kTileVecs * Dot::kVecColumns;
  constexpr int32_t kFromZero[kColumns] = {};
  const Dot::Vec one = Dot::broadcast_a(kOnes);
  for (int64_t column = 0; column < kPanelColumns; column += kColumns) {
    Dot::Vec sums[Dot::kTileVecs];
    unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) { sums[v] = Dot::zero(); });
    for (int64_t g = 0; g < int8_groups(depth); ++g) {
      const int8_t* group = panel + g * kPanelColumnGroup + column * kGroupDepth;
      unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) {
        sums[v] = Dot::multiply_add(sums[v], one, Dot::load_b(group + v * Dot::kVecColumns * kGroupDepth));
      });
    }
    Dot::store(sums, kFromZero, compensation + column);
  }
  for (int64_t c = 0; c < kPanelColumns; ++c) {
    compensation[c] = static_cast<int32_t>(-128 * static_cast<uint32_t>(compensation[c]));
  }
}

#if defined(__AVX512VNNI__)
// Four rows of A at once, 4 groups a step: q + 128 of each byte is q with its top bit flipped. Returns how many groups
// are done; what is left is less than a step.
inline int64_t pack_four_rows(const int8_t* a, int64_t stride_a, int64_t depth, int64_t stride_group, uint8_t* target) {
  const __m128i top_bits = _mm_set1_epi8(-128);
  int64_t g = 0;
  for (; (g + 4) * kGroupDepth <= depth; g += 4) {
    __m128i r[4], pairs[4];
    unroll<4>(FASTATTN_LAMBDA(i) {
      const void* row = a + i * stride_a + g * kGroupDepth;
      r[i] = _mm_xor_si128(_mm_loadu_si128(static_cast<const __m128i*>(row)), top_bits);
    });
    pairs[0] = _mm_unpacklo_epi32(r[0], r[1]);
    pairs[1] = _mm_unpackhi_epi32(r[0], r[1]);
    pairs[2] = _mm_unpacklo_epi32(r[2], r[3]);
    pairs[3] = _mm_unpackhi_epi32(r[2], r[3]);
    const __m128i groups[4] = {_mm_unpacklo_epi64(pairs[0], pairs[2]), _mm_unpackhi_epi64(pairs[0], pairs[2]),
                               _mm_unpacklo_epi64(pairs[1], pairs[3]), _mm_unpackhi_epi64(pairs[1], pairs[3])};
    unroll<4>(FASTATTN_LAMBDA(i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + (g + i) * stride_group), groups[i]);
    });
  }
  return g;
}
#endif

// panel[g][r][0..4) = a[r][4g..4g+4) as Dot::A, for `rows` (1 to kTileRows) rows of a.
inline void pack_a_panel(const int8_t* a, int64_t stride_a, int rows, int64_t depth, Dot::A* panel) {
  const int64_t groups = int8_groups(depth), stride_group = row_group(rows);
  int64_t done = 0;
  for (int r = 0; r < rows; ++r) {
#if defined(__AVX512VNNI__)
    // Rows without three others beside them are packed one by one.
    if (r % 4 == 0) {
      done =
          r + 4 <= rows ? pack_four_rows(a + r * stride_a, stride_a, depth, stride_group, panel + r * kGroupDepth) : 0;
    }
#endif
    const int8_t* row = a + r * stride_a;
    Dot::A* target = panel + r * kGroupDepth;
    for (int64_t g = done; g < groups; ++g) {
      const uint32_t group = load_group(row, g * kGroupDepth, depth);
      if constexpr (sizeof(Dot::A) == 1) {
        // q + 128 of each byte is q with its top bit flipped.
        const uint32_t shifted = group ^ 0x80808080u;
        std::memcpy(target + g * stride_group, &shifted, 4);
      } else {
        for (int i = 0; i < kGroupDepth; ++i) {
          target[g * stride_group + i] = static_cast<Dot::A>(static_cast<int8_t>(group >> (8 * i)));
        }
      }
    }
  }
}

// --- Quantising straight into a panel ---

#if defined(__AVX2__)
constexpr bool kQuantizesIntoPanel = true;
#else
constexpr bool kQuantizesIntoPanel = false;
#endif

// So many rows fill the 128-bit lanes of a vector with a group each, as they stand in the panel: narrowing their int32
// values, which works within lanes, interleaves them on the way.
#if defined(__AVX2__)
constexpr int kLaneRows = 16 / (kGroupDepth * static_cast<int>(sizeof(Dot::A)));

// Rounds kRows rows of Vec<float>::kLanes values (magnitude below 128) and stores their first `groups` groups.
template <int kRows>
FASTATTN_INLINE void store_groups(const Vec<float> (&x)[kRows], int64_t groups, int64_t stride_group, Dot::A* target) {
#if defined(__AVX512VNNI__)
  // Fewer rows than lanes hold are repeated, and stored once.
  constexpr __mmask8 kStored = (1 << kRows) - 1;
  __m512i q[kRows];
  unroll<kRows>(FASTATTN_LAMBDA(i) { q[i] = _mm512_cvtps_epi32(x[i].v); });
  const __m512i low = _mm512_packs_epi32(q[0], q[1 % kRows]), high = _mm512_packs_epi32(q[2 % kRows], q[3 % kRows]);
  const __m512i lanes = _mm512_xor_si512(_mm512_packs_epi16(low, high), _mm512_set1_epi8(-128));
  unroll<4>(FASTATTN_LAMBDA(lane) {
    if (lane < groups) {
      _mm_mask_storeu_epi32(target + lane * stride_group, kStored,
                            _mm512_extracti32x4_epi32(lanes, decltype(lane)::value));
    }
  });
#else
  const __m256i lanes = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1 % kRows].v));
  unroll<2>(FASTATTN_LAMBDA(lane) {
    if (lane < groups) {
      const __m128i group = _mm256_extracti128_si256(lanes, decltype(lane)::value);
      std::memcpy(target + lane * stride_group, &group, static_cast<size_t>(kRows) * kGroupDepth * sizeof(Dot::A));
    }
  });
#endif
}

// Rows [0, kRows) of a panel. What a row that is not finite becomes does not matter: its scale makes it NaN.
template <int kRows, typename Element>
FASTATTN_INLINE void quantize_lane_rows(const Element* a, int64_t stride_a, int64_t depth, int64_t stride_group,
                                        Dot::A* target, float* scales) {
  using V = Vec<float>;
  constexpr int64_t kVecGroups = V::kLanes / kGroupDepth;
  V inverse[kRows];
  unroll<kRows>(FASTATTN_LAMBDA(i) {
    scales[i] = row_scale(a + i * stride_a, depth);
    inverse[i] = V::set1(1.0f / scales[i]);
  });
  V x[kRows];
  int64_t k = 0;
  for (; k + V::kLanes <= depth; k += V::kLanes, target += kVecGroups * stride_group) {
    unroll<kRows>(FASTATTN_LAMBDA(i) { x[i] = V::load_as(a + i * stride_a + k) * inverse[i]; });
    store_groups(x, kVecGroups, stride_group, target);
  }
  if (k == depth) return;
  const int rest = static_cast<int>(depth - k);
  unroll<kRows>(FASTATTN_LAMBDA(i) { x[i] = V::load_as_partial(a + i * stride_a + k, rest) * inverse[i]; });
  store_groups(x, int8_groups(rest), stride_group, target);
}
#endif

// The panel of `rows` rows of a, and their scales. Unless kQuantizesIntoPanel, the rows pass through `scratch`.
template <typename Element>
void quantize_a_panel(const Element* a, int64_t stride_a, int rows, int64_t depth, [[maybe_unused]] int8_t* scratch,
                      [[maybe_unused]] int64_t stride_scratch, Dot::A* panel, float* scales) {
#if defined(__AVX2__)
  const auto quantize = [&](auto lane_rows, int row) __attribute__((always_inline)) {
    quantize_lane_rows<decltype(lane_rows)::value>(a + row * stride_a, stride_a, depth, row_group(rows),
                                                   panel + row * kGroupDepth, scales + row);
  };
  int row = 0;
  for (; row + kLaneRows <= rows; row += kLaneRows) quantize(std::integral_constant<int, kLaneRows>{}, row);
  unroll<kLaneRows>(FASTATTN_LAMBDA(left) {
    if constexpr (left > 0) {
      if (rows - row == left) quantize(left, row);
    }
  });
#else
  for (int row = 0; row < rows; ++row) {
    scales[row] = quantize_row(a + row * stride_a, depth, scratch + row * stride_scratch);
  }
  pack_a_panel(scratch, stride_scratch, rows, depth, panel);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
