// The register tile under the INT8 matrix product: int32 dot products of up to kTileRows rows of A with one panel of B.
//
// One loop for every instruction set; struct Dot is what differs. A step multiplies a group of 4 neighbours in k:
//   AVX-512 VNNI  vpdpbusd multiplies unsigned by signed bytes, so A is stored as q + 128, and 128 * sum_k b, known
//                 when B is packed, is subtracted. (vpmaddubsw, its AVX2 cousin, saturates at 16 bits: not exact.)
//   AVX2          vpmaddwd on A and B widened to 16 bits: exact, two columns' partial sums side by side.
//   portable      16-bit products, which hold any product of two bytes, halved into 32-bit sums by shifts.
// Wrap-around of the int32 sums on the way is harmless: the final value fits (kInt8MaxDepth), and mod 2^32 it is exact.
#pragma once

#include "common/simd.h"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if defined(__AVX512VNNI__)

struct Dot {
  using A = uint8_t;
  using Vec = __m512i;
  static constexpr A kZero = 128;
  // 12 x 2 accumulators + 2 vectors of B + 1 of A = 27 of 32 registers; 14 loads feed 24 vpdpbusd.
  static constexpr int kTileRows = 12, kTileVecs = 2, kVecColumns = 16;

  static FASTATTN_INLINE Vec zero() { return _mm512_setzero_si512(); }
  static FASTATTN_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static FASTATTN_INLINE Vec load_b(const int8_t* b) { return _mm512_loadu_si512(b); }
  static FASTATTN_INLINE Vec broadcast_a(const A* a) {
    int32_t group;
    std::memcpy(&group, a, sizeof group);
    return _mm512_set1_epi32(group);
  }
  // Not _mm512_dpbusd_epi32: GCC 12 copies the accumulator before and after it, spills the copies, and runs at half
  // speed.
  static FASTATTN_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  // c[0, kTileVecs * kVecColumns) = start + acc
  static FASTATTN_INLINE void store(const Vec (&acc)[kTileVecs], const int32_t* start, int32_t* c) {
    unroll<kTileVecs>(FASTATTN_LAMBDA(v) {
      _mm512_storeu_si512(c + v * 16, _mm512_add_epi32(acc[v], _mm512_loadu_si512(start + v * 16)));
    });
  }
};

#elif defined(__AVX2__)

struct Dot {
  using A = int16_t;
  using Vec = __m256i;
  static constexpr A kZero = 0;
  // 6 x 2 accumulators + 2 vectors of B + 1 of A + 1 product = 16 registers.
  static constexpr int kTileRows = 6, kTileVecs = 2, kVecColumns = 4;

  static FASTATTN_INLINE Vec zero() { return _mm256_setzero_si256(); }
  static FASTATTN_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static FASTATTN_INLINE Vec load_b(const int8_t* b) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  }
  static FASTATTN_INLINE Vec broadcast_a(const A* a) {
    int64_t group;
    std::memcpy(&group, a, sizeof group);
    return _mm256_set1_epi64x(group);
  }
  // The addition is tied to the accumulator's register, as in the AVX-512 form: GCC 12 would spill 8 of the 12.
  static FASTATTN_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(a, b)));
    return acc;
  }
  static FASTATTN_INLINE void store(const Vec (&acc)[kTileVecs], const int32_t* start, int32_t* c) {
    // hadd works within 128-bit halves: columns 0 1 4 5 | 2 3 6 7.
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[0], acc[1]), 0b11011000);
    const __m256i initial = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), _mm256_add_epi32(sums, initial));
  }
};

#else

struct Dot {
  using A = int16_t;
  typedef int32_t Vec __attribute__((vector_size(16)));
  typedef int16_t Vec16 __attribute__((vector_size(16)));
  typedef int8_t Vec8 __attribute__((vector_size(8)));
  static constexpr A kZero = 0;
  static constexpr int kTileRows = 4, kTileVecs = 2, kVecColumns = 2;

  static FASTATTN_INLINE Vec zero() { return Vec{}; }
  static FASTATTN_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static FASTATTN_INLINE Vec load_b(const int8_t* b) {
    Vec8 bytes;
    std::memcpy(&bytes, b, sizeof bytes);
    return (Vec) __builtin_convertvector(bytes, Vec16);
  }
  static FASTATTN_INLINE Vec broadcast_a(const A* a) {
    typedef int64_t Vec64 __attribute__((vector_size(16)));
    int64_t group;
    std::memcpy(&group, a, sizeof group);
    return (Vec)Vec64{group, group};
  }
  static FASTATTN_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
    const Vec products = (Vec)((Vec16)a * (Vec16)b);
    return acc + ((products << 16) >> 16) + (products >> 16);
  }
  static FASTATTN_INLINE void store(const Vec (&acc)[kTileVecs], const int32_t* start, int32_t* c) {
    unroll<kTileVecs>(FASTATTN_LAMBDA(v) {
      c[2 * v] = start[2 * v] + acc[v][0] + acc[v][1];
      c[2 * v + 1] = start[2 * v + 1] + acc[v][2] + acc[v][3];
    });
  }
};

#endif

// A's panel of up to kTileRows rows is [groups][rows][4] of Dot::A: few rows stand as close as many.
constexpr int64_t row_group(int rows) { return rows * kGroupDepth; }
constexpr int64_t kPanelColumnGroup = kPanelColumns * kGroupDepth;

// Few rows leave few accumulators, which would wait for each other (latency 4-5 cycles, two products a cycle): then
// several groups of k go to accumulators of their own.
constexpr int dot_chains(int rows) {
  const int fit = Dot::kTileRows * Dot::kTileVecs / (rows * Dot::kTileVecs);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <int kRows>
FASTATTN_INLINE void dot_step(Dot::Vec (&acc)[kRows][Dot::kTileVecs], const Dot::A* a, const int8_t* b) {
  Dot::Vec b_vecs[Dot::kTileVecs];
  unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) { b_vecs[v] = Dot::load_b(b + v * Dot::kVecColumns * kGroupDepth); });
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    const Dot::Vec a_vec = Dot::broadcast_a(a + r * kGroupDepth);
    unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = Dot::multiply_add(acc[r][v], a_vec, b_vecs[v]); });
  });
}

// c[r][0, 32) = start[r * start_stride][0, 32) + sum over `groups` groups of a[r] * b. c has a row stride of 32. B is
// prefetched that many bytes ahead; 0 does nothing.
template <int kRows>
void dot_tile(const Dot::A* a, const int8_t* b, int64_t groups, int64_t prefetch_bytes, const int32_t* start,
              int64_t start_stride, int32_t* c) {
  constexpr int kChains = dot_chains(kRows);
  constexpr int kColumns = Dot::kTileVecs * Dot::kVecColumns;
  // Four groups of k a turn: the branch predictors then remember all turns of K = 768 and foresee the last one.
  constexpr int kSteps = 4;
  static_assert(kSteps % kChains == 0, "each chain takes its turn");
  for (int64_t column = 0; column < kPanelColumns; column += kColumns) {
    Dot::Vec acc[kChains][kRows][Dot::kTileVecs];
    unroll<kChains>(FASTATTN_LAMBDA(chain) {
      unroll<kRows>(
          FASTATTN_LAMBDA(r) { unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) { acc[chain][r][v] = Dot::zero(); }); });
    });
    const Dot::A* a_group = a;
    const int8_t* b_group = b + column * kGroupDepth;
    int64_t group = 0;
    for (; group + kSteps <= groups; group += kSteps) {
      unroll<kSteps>(FASTATTN_LAMBDA(step) {
        // 0 comes with a row or two; more have so much to do that the question would cost what it saves.
        if (kRows > 2 || prefetch_bytes != 0) {
          __builtin_prefetch(b_group + prefetch_bytes);
          __builtin_prefetch(b_group + prefetch_bytes + 64);
        }
        dot_step<kRows>(acc[step % kChains], a_group, b_group);
        a_group += row_group(kRows);
        b_group += kPanelColumnGroup;
      });
    }
    for (; group < groups; ++group) {
      dot_step<kRows>(acc[0], a_group, b_group);
      a_group += row_group(kRows);
      b_group += kPanelColumnGroup;
    }
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      unroll<kChains - 1>(FASTATTN_LAMBDA(chain) {
        unroll<Dot::kTileVecs>(FASTATTN_LAMBDA(v) { acc[0][r][v] = Dot::add(acc[0][r][v], acc[chain + 1][r][v]); });
      });
      Dot::store(acc[0][r], start + r * start_stride + column, c + r * kPanelColumns + column);
    });
  }
}

using DotTileFn = void (*)(const Dot::A*, const int8_t*, int64_t, int64_t, const int32_t*, int64_t, int32_t*);

// kDotTiles[rows - 1] is dot_tile<rows>.
template <int... kIndex>
constexpr auto make_dot_tiles(std::integer_sequence<int, kIndex...>) {
  struct Table {
    DotTileFn tiles[sizeof...(kIndex)];
  };
  return Table{{dot_tile<kIndex + 1>...}};
}
constexpr auto kDotTiles = make_dot_tiles(std::make_integer_sequence<int, Dot::kTileRows>{});

}  // namespace FASTATTN_ISA
}  // namespace fastattn
