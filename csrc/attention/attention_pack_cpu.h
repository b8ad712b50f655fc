// Operands of the CPU attention kernels brought into the form that gemm_tile reads: converted to T, keys transposed,
// rows padded with zeros to whole vectors. A tile is kTileKeys keys.
#pragma once

#include "attention/attention_scores_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <typename T>
FASTATTN_INLINE int64_t whole_vectors(int64_t count) {
  return (count + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
}

namespace detail {

#if defined(__AVX512F__)

// Rows become columns: pairs, then quads by unpacking, then blocks of 128 bits by shuffling.
FASTATTN_INLINE void transpose(Vec<float> (&r)[16]) {
  __m512 t[16];
  unroll<8>(FASTATTN_LAMBDA(i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  });
  __m512 u[16];
  unroll<4>(FASTATTN_LAMBDA(i) {
    const auto low = [](__m512 a, __m512 b) __attribute__((always_inline)) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](__m512 a, __m512 b) __attribute__((always_inline)) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    u[4 * i] = low(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = high(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = low(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = high(t[4 * i + 1], t[4 * i + 3]);
  });
  unroll<4>(FASTATTN_LAMBDA(i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xDD);
  });
  unroll<4>(FASTATTN_LAMBDA(i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xDD);
    r[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xDD);
  });
}

#elif defined(__AVX2__)

FASTATTN_INLINE void transpose(Vec<float> (&r)[8]) {
  __m256 t[8], u[8];
  unroll<4>(FASTATTN_LAMBDA(i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  });
  unroll<2>(FASTATTN_LAMBDA(i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  });
  unroll<4>(FASTATTN_LAMBDA(i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  });
}

#endif

// Where there is no shuffle network: through the stack.
template <typename T>
FASTATTN_INLINE void transpose(Vec<T> (&r)[Vec<T>::kLanes]) {
  constexpr int kLanes = Vec<T>::kLanes;
  T rows[kLanes][kLanes], columns[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) r[i].store(rows[i]);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) columns[j][i] = rows[i][j];
  }
  for (int i = 0; i < kLanes; ++i) r[i] = Vec<T>::load(columns[i]);
}

}  // namespace detail

// rows[i] is row i, as of an array of addresses.
template <typename Element>
struct StridedRows {
  const Element* first;
  int64_t stride;
  FASTATTN_INLINE const Element* operator[](int64_t row) const { return first + row * stride; }
};

// dst[d * kTileKeys + key] = factor * rows[key][d] for d < depth; keys from `keys` on are 0.
template <typename T, typename Rows>
FASTATTN_INLINE void pack_keys(T* dst, const Rows& rows, int keys, int depth, T factor = 1) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  constexpr int kLanes = V::kLanes;
  for (int key = 0; key < kTileKeys; key += kLanes) {
    for (int d = 0; d < depth; d += kLanes) {
      T* columns = dst + d * kTileKeys + key;
      V block[kLanes];
      if (key + kLanes <= keys && d + kLanes <= depth) {
        unroll<kLanes>(FASTATTN_LAMBDA(i) { block[i] = V::load_as(rows[key + i] + d) * scale; });
        detail::transpose(block);
        unroll<kLanes>(FASTATTN_LAMBDA(i) { block[i].store(columns + i * kTileKeys); });
      } else {
        unroll<kLanes>(FASTATTN_LAMBDA(i) {
          block[i] = key + i < keys ? V::load_as_partial(rows[key + i] + d, depth - d) * scale : V::zero();
        });
        detail::transpose(block);
        unroll<kLanes>(FASTATTN_LAMBDA(i) {
          if (d + i < depth) block[i].store(columns + i * kTileKeys);
        });
      }
    }
  }
}

// dst[row * ld + c] = factor * rows[row][c] for row < count, c < columns, then 0 up to a whole vector.
template <typename T, typename Rows>
FASTATTN_INLINE void pack_rows(T* dst, int64_t ld, const Rows& rows, int count, int columns, T factor = 1) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  const int whole = columns / V::kLanes * V::kLanes;
  for (int row = 0; row < count; ++row, dst += ld) {
    const auto* src = rows[row];
    for (int c = 0; c < whole; c += V::kLanes) (V::load_as(src + c) * scale).store(dst + c);
    if (whole < columns) (V::load_as_partial(src + whole, columns - whole) * scale).store(dst + whole);
  }
}

// The same of rows at src, `stride` apart.
template <typename T, typename Element>
FASTATTN_INLINE void pack_keys(T* dst, const Element* src, int64_t stride, int keys, int depth) {
  pack_keys(dst, StridedRows<Element>{src, stride}, keys, depth);
}
template <typename T, typename Element>
FASTATTN_INLINE void pack_rows(T* dst, int64_t ld, const Element* src, int64_t stride, int rows, int columns,
                               T factor = 1) {
  pack_rows(dst, ld, StridedRows<Element>{src, stride}, rows, columns, factor);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
