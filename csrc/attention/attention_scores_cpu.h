// From dot products to scores, for the CPU kernels: what forward, backward and weights have to agree on.
//   score = softcap(scale * q.k) - slope * |distance| + mask, hidden (-inf) outside the band and where a boolean mask
//   says so.
// Work is cut into tiles of some rows by kTileKeys keys. Which keys of a row are visible, and which dropout keeps, is
// one 64-bit word a row, so that every kind of masking reaches the arithmetic in one form.
#pragma once

#include "attention/attention.h"
#include "attention/mask.h"
#include "common/dropout_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int kTileKeys = 64;

enum class TileView { kHidden, kPartial, kFull };

// Keys [first, last) of a tile, as bits.
FASTATTN_INLINE uint64_t key_bits(int64_t first, int64_t last) {
  first = max_of<int64_t>(first, 0);
  last = min_of<int64_t>(last, kTileKeys);
  if (first >= last) return 0;
  return (~uint64_t{0} >> (kTileKeys - (last - first))) << first;
}

// One row of a boolean mask, `keys` <= 64 of it, as bits.
FASTATTN_INLINE uint64_t bool_mask_bits(const uint8_t* mask, int64_t stride_k, int keys) {
  if (stride_k == 0) return *mask ? key_bits(0, keys) : 0;
#if defined(__AVX512F__)
  if (stride_k == 1) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(key_bits(0, keys), mask);
    return _mm512_test_epi8_mask(bytes, bytes);
  }
#elif defined(__AVX2__)
  if (stride_k == 1 && keys == kTileKeys) {
    const auto zeros = [](const uint8_t* p) __attribute__((always_inline)) {
      return static_cast<uint32_t>(
          _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)p), _mm256_setzero_si256())));
    };
    return ~(uint64_t{zeros(mask)} | uint64_t{zeros(mask + 32)} << 32);
  }
#endif
  uint64_t bits = 0;
  for (int key = 0; key < keys; ++key) bits |= uint64_t{mask[key * stride_k] != 0} << key;
  return bits;
}

// One row of an additive mask, converted: dst[key] for key < keys, then 0 up to a whole tile.
template <typename T, typename Element>
FASTATTN_INLINE void load_mask_row(T* dst, const Element* mask, int64_t stride_k, int keys) {
  using V = Vec<T>;
  // Vec<float> does not convert from double.
  constexpr bool kVectors = sizeof(Element) <= sizeof(T);
  if (kVectors && stride_k == 1 && keys == kTileKeys) {
    if constexpr (kVectors) {
      for (int key = 0; key < kTileKeys; key += V::kLanes) V::load_as(mask + key).store(dst + key);
    }
    return;
  }
  for (int key = 0; key < keys; ++key) dst[key] = static_cast<T>(to_float(mask[key * stride_k]));
  for (int key = keys; key < kTileKeys; ++key) dst[key] = 0;
}

// Rows of a tile of an additive mask that can be added in vectors where they are. data == nullptr: there is none.
template <typename T>
struct MaskRows {
  const T* data = nullptr;
  int64_t stride = 0;
  int rows = 0;

  // Row r, or the last one for rows that only fill up a register tile.
  FASTATTN_INLINE const T* row(int r) const { return data + min_of(r, rows - 1) * stride; }
  // Rows of a mask are far apart, which the hardware's own prefetchers do not follow. The product before their use
  // takes longer than the hint.
  FASTATTN_INLINE void prefetch(int count) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    if (data == nullptr || stride == 0) return;
    for (int r = 0; r < count; ++r) {
      for (int key = 0; key < kTileKeys; key += kLine) __builtin_prefetch(row(r) + key);
    }
  }
};

// The rules of one (batch, head). T is float, or double for fp64 inputs.
template <typename T>
struct HeadScores {
  Band band;
  // What turns q.k into the argument of add_terms and softcap: multiply q, k or their product by it.
  T dot_factor = 1;
  T softcap = 0;
  T alibi_slope = 0;
  // At (batch, head, 0, 0); at most one of the two is set.
  const uint8_t* bool_mask = nullptr;
  const void* additive_mask = nullptr;
  DType additive_dtype = DType::kFloat32;
  int64_t mask_stride_q = 0, mask_stride_k = 0;

  // Whether dot_factor * q.k needs more than hiding to become a score.
  FASTATTN_INLINE bool has_terms() const { return softcap != 0 || alibi_slope != 0 || additive_mask != nullptr; }

  // The mask at rows from row0 on and keys [key0, key0 + 64), if adding it is all that dot_factor * q.k needs and it
  // lies in memory as the arithmetic reads it: in T, neighbour by neighbour, the tile whole.
  FASTATTN_INLINE MaskRows<T> mask_rows(int64_t row0, int64_t key0) const {
    constexpr DType kOwn = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
    const bool readable = additive_mask != nullptr && additive_dtype == kOwn && mask_stride_k == 1;
    if (!readable || softcap != 0 || alibi_slope != 0 || key0 + kTileKeys > band.seqlen_k || row0 >= band.seqlen_q) {
      return {};
    }
    return {static_cast<const T*>(additive_mask) + row0 * mask_stride_q + key0, mask_stride_q,
            static_cast<int>(min_of<int64_t>(band.seqlen_q - row0, 1 << 20))};
  }

  // How much of rows x [key0, key0 + 64) is visible. For kPartial, bits[r] says which keys row rows.begin + r sees;
  // bits past seqlen_k are never set.
  FASTATTN_INLINE TileView view(IndexRange rows, int64_t key0, uint64_t* bits) const {
    const IndexRange any = band.keys_seen_by_any(rows), all = band.keys_seen_by_all(rows);
    const int64_t key_end = key0 + kTileKeys;
    if (any.begin >= key_end || any.end <= key0) return TileView::kHidden;
    const bool band_is_full = all.begin <= key0 && all.end >= key_end;
    if (bool_mask == nullptr) {
      if (band_is_full) return TileView::kFull;
      for (int64_t row = rows.begin; row < rows.end; ++row) bits[row - rows.begin] = band_bits(row, key0);
      return TileView::kPartial;
    }
    const int keys = static_cast<int>(min_of<int64_t>(band.seqlen_k - key0, kTileKeys));
    const uint8_t* mask = bool_mask + key0 * mask_stride_k;
    const uint64_t shared = mask_stride_q == 0 ? bool_mask_bits(mask, mask_stride_k, keys) : 0;
    if (mask_stride_q == 0 && shared == 0) return TileView::kHidden;
    uint64_t seen_by_any = 0, seen_by_all = ~uint64_t{0};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      uint64_t row_bits = band_is_full ? ~uint64_t{0} : band_bits(row, key0);
      row_bits &= mask_stride_q == 0 ? shared : bool_mask_bits(mask + row * mask_stride_q, mask_stride_k, keys);
      bits[row - rows.begin] = row_bits;
      seen_by_any |= row_bits;
      seen_by_all &= row_bits;
    }
    if (seen_by_any == 0) return TileView::kHidden;
    return seen_by_all == ~uint64_t{0} ? TileView::kFull : TileView::kPartial;
  }

  // scores[r * ld + key] = softcap * tanh(scores), where scores were dot_factor * q.k; slope, if given, gets the
  // derivative 1 - tanh^2. Only if softcap != 0.
  FASTATTN_INLINE void cap(T* scores, int64_t ld, int rows, T* slope = nullptr) const {
    using V = Vec<T>;
    for (int r = 0; r < rows; ++r) {
      for (int key = 0; key < kTileKeys; key += V::kLanes) {
        const V t = tanh(V::load(scores + r * ld + key));
        if (slope) fnma(t, t, V::set1(1)).store(slope + r * ld + key);
        (t * V::set1(softcap)).store(scores + r * ld + key);
      }
    }
  }

  // Adds ALiBi and the additive mask to rows [row0, row0 + rows) x [key0, key0 + 64). Rows that only fill up a register
  // tile, past seqlen_q, are left alone: the mask ends before them.
  FASTATTN_INLINE void add_terms(T* scores, int64_t ld, int64_t row0, int rows, int64_t key0) const {
    rows = static_cast<int>(min_of<int64_t>(rows, band.seqlen_q - row0));
    if (alibi_slope != 0) add_alibi(scores, ld, row0, rows, key0);
    if (additive_mask == nullptr) return;
    switch (additive_dtype) {
      case DType::kFloat32:
        return add_mask<float>(scores, ld, row0, rows, key0);
      case DType::kBFloat16:
        return add_mask<BFloat16>(scores, ld, row0, rows, key0);
      case DType::kFloat16:
        return add_mask<Float16>(scores, ld, row0, rows, key0);
      default:
        return add_mask<double>(scores, ld, row0, rows, key0);
    }
  }

 private:
  FASTATTN_INLINE uint64_t band_bits(int64_t row, int64_t key0) const {
    const IndexRange keys = band.keys_seen_by(row);
    return key_bits(keys.begin - key0, keys.end - key0);
  }

  FASTATTN_INLINE void add_alibi(T* scores, int64_t ld, int64_t row0, int rows, int64_t key0) const {
    using V = Vec<T>;
    for (int r = 0; r < rows; ++r) {
      const V first = V::iota() + V::set1(static_cast<T>(key0 - (row0 + r + band.diagonal)));
      for (int key = 0; key < kTileKeys; key += V::kLanes) {
        const V distance = abs(first + V::set1(static_cast<T>(key)));
        fnma(V::set1(alibi_slope), distance, V::load(scores + r * ld + key)).store(scores + r * ld + key);
      }
    }
  }

  template <typename Element>
  FASTATTN_INLINE void add_mask(T* scores, int64_t ld, int64_t row0, int rows, int64_t key0) const {
    using V = Vec<T>;
    const int keys = static_cast<int>(min_of<int64_t>(band.seqlen_k - key0, kTileKeys));
    const Element* mask = static_cast<const Element*>(additive_mask) + row0 * mask_stride_q + key0 * mask_stride_k;
    alignas(64) T row[kTileKeys];
    for (int r = 0; r < rows; ++r) {
      if (r == 0 || mask_stride_q != 0) load_mask_row(row, mask + r * mask_stride_q, mask_stride_k, keys);
      for (int key = 0; key < kTileKeys; key += V::kLanes) {
        (V::load(scores + r * ld + key) + V::load(row + key)).store(scores + r * ld + key);
      }
    }
  }
};

template <typename T>
FASTATTN_INLINE HeadScores<T> make_head_scores(const AttentionParams& p, int64_t batch, int64_t head) {
  HeadScores<T> scores;
  scores.band = make_band(p);
  scores.softcap = static_cast<T>(p.softcap);
  scores.dot_factor = static_cast<T>(p.softcap != 0 ? p.scale / p.softcap : p.scale);
  if (p.alibi_slopes) scores.alibi_slope = static_cast<T>(p.alibi_slopes[batch * p.stride_alibi_batch + head]);
  if (p.mask.data == nullptr) return scores;
  const int64_t offset = batch * p.mask.stride_batch + head * p.mask.stride_head;
  const int64_t element_bytes = p.mask.dtype == DType::kBool      ? 1
                                : p.mask.dtype == DType::kFloat32 ? 4
                                : p.mask.dtype == DType::kFloat64 ? 8
                                                                  : 2;
  const char* data = static_cast<const char*>(p.mask.data) + offset * element_bytes;
  if (p.mask.dtype == DType::kBool) {
    scores.bool_mask = reinterpret_cast<const uint8_t*>(data);
  } else {
    scores.additive_mask = data;
    scores.additive_dtype = p.mask.dtype;
  }
  scores.mask_stride_q = p.mask.stride_q;
  scores.mask_stride_k = p.mask.stride_k;
  return scores;
}

// Scores of keys whose bit is not set become -inf.
template <typename T>
FASTATTN_INLINE void hide_keys(T* scores, int64_t ld, int rows, const uint64_t* bits) {
  using V = Vec<T>;
  for (int r = 0; r < rows; ++r) {
    for (int key = 0; key < kTileKeys; key += V::kLanes) {
      const auto visible = V::mask_from_bits(static_cast<uint32_t>(bits[r] >> key));
      select(visible, V::load(scores + r * ld + key), V::set1(-__builtin_inf())).store(scores + r * ld + key);
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
