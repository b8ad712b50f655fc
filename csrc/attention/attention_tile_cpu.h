// The two products of forward attention on one tile: scores = q k^T with the running softmax behind it, and out += p v.
#pragma once

#include <limits>

#include "attention/attention_operand_cpu.h"
#include "attention/attention_scores_cpu.h"
#include "common/gemm_tile.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A row's largest score may run this far ahead of the one it is scaled by before everything so far is rescaled: terms
// stay below e^8 and keep their precision, and rescaling nearly never happens after the first tile.
constexpr float kRescaleMargin = 8.0f;

// A dot product is summed in equal pieces of at most 64 terms: one chain of 256 would lose more than eager does.
FASTATTN_INLINE int depth_step_of(int depth, int64_t rows, int64_t columns) {
  const int longest = chain_length(rows, columns, depth, 64), pieces = (depth + longest - 1) / longest;
  return (depth + pieces - 1) / pieces;
}

// Some rows on their way through the keys. Row r's probabilities of this tile are at p + r * kTileKeys / kTerms.
template <typename T, typename Operand = T>
struct RowBlock {
  const HeadScores<T>* scores;
  const Dropout* dropout;
  uint32_t batch_head;
  int depth;       // head_dim, in elements of Operand
  int depth_step;  // summed on its own
  int64_t row0;
  const Operand* q;  // a row every stride_q; where Operand is T, the keys are times dot_factor
  int64_t stride_q;
  Operand* p;
  T* raw;      // where scores wait for their terms, a row every kTileKeys; the memory of p where Operand is T
  T* row_max;  // the score that row is scaled by
  T* row_sum;  // rows x Vec<T>::kLanes: partial sums of e^(score - row_max)
  T* out;      // rows x ld_out, not yet divided by the sum
  int64_t ld_out;
};

template <typename Operand>
struct KeyTile {
  const Operand* k;  // depth x kTileKeys
  int64_t key0;
  // The vectors of a row that any row sees: [vec_begin, vec_end) of kTileKeys / kLanes.
  int vec_begin, vec_end;
  const uint64_t* visible;  // a word a row, nullptr = all keys
  bool first;               // nothing has been accumulated yet
};

// One row's scores, kVecs vectors of them, become e^(score - row_max). Returns them before dropout sums, after it in x.
template <int kVecs, typename T, typename Operand>
FASTATTN_INLINE void softmax_step(Vec<T> (&x)[kVecs], const RowBlock<T, Operand>& rows, int row, bool first) {
  using V = Vec<T>;
  V largest = x[0];
  unroll<kVecs>(FASTATTN_LAMBDA(v) { largest = max(largest, x[v]); });
  T* sum = rows.row_sum + row * V::kLanes;
  V scaled_by, partial_sum;
  if (first) {
    // Finite even if the row sees nothing so far: e^(-inf - row_max) is then 0, not NaN.
    const T row_max = max_of(largest.reduce_max(), std::numeric_limits<T>::lowest());
    rows.row_max[row] = row_max;
    scaled_by = V::set1(row_max);
    partial_sum = V::zero();
  } else {
    scaled_by = V::set1(rows.row_max[row]);
    partial_sum = V::load(sum);
    if (__builtin_expect(any(less(scaled_by + V::set1(kRescaleMargin), largest)), 0)) {
      const T row_max = largest.reduce_max();
      const V factor = exp(scaled_by - V::set1(row_max));
      T* out = rows.out + row * rows.ld_out;
      for (int64_t c = 0; c < rows.ld_out; c += V::kLanes) (V::load(out + c) * factor).store(out + c);
      rows.row_max[row] = row_max;
      scaled_by = V::set1(row_max);
      partial_sum = partial_sum * factor;
    }
  }
  unroll<kVecs>(FASTATTN_LAMBDA(v) {
    x[v] = exp(x[v] - scaled_by);
    partial_sum = partial_sum + x[v];
  });
  partial_sum.store(sum);
}

template <int kVecs, typename T>
FASTATTN_INLINE void keep_lanes(Vec<T> (&x)[kVecs], uint64_t bits, T hidden) {
  unroll<kVecs>(FASTATTN_LAMBDA(v) {
    const auto mask = Vec<T>::mask_from_bits(static_cast<uint32_t>(bits >> (v * Vec<T>::kLanes)));
    x[v] = select(mask, x[v], Vec<T>::set1(hidden));
  });
}

// Rows [0, kRows) of the block against kVecs vectors of keys: p = e^(score - row_max) after dropout.
// On AVX-512 kVecs vectors stay in registers from the product to the exponential.
// kPlain: there is neither a mask that is added, nor another term of the scores, nor dropout. The code for them, even
// where it is not taken, keeps scores and constants of the exponential out of registers.
template <int kRows, int kVecs, bool kHide, bool kPlain, typename T, typename Operand>
__attribute__((noinline)) void score_tile(const RowBlock<T, Operand>& rows, const KeyTile<Operand>& tile) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  constexpr int kProductVecs = kVecs < kTileVecs ? kVecs : kTileVecs;
  const int lane0 = tile.vec_begin * kLanes;
  const MaskRows<T> mask = kPlain ? MaskRows<T>{} : rows.scores->mask_rows(rows.row0, tile.key0);
  mask.prefetch(kRows);
  if (tile.first) {
    // The next register tile's rows may lie in memory, where nobody has read them yet. Past the last one, hints do no
    // harm.
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      const Operand* row = rows.q + (kRows + r) * rows.stride_q;
      for (int d = 0; d < rows.depth; d += 64 / static_cast<int>(sizeof(Operand))) __builtin_prefetch(row + d);
    });
  }
  const bool has_terms = !kPlain && mask.data == nullptr && rows.scores->has_terms();
  const bool stays_in_registers = kVecs == kProductVecs && !has_terms;
  V acc[kRows][kProductVecs];
  for (int vec = 0; vec < kVecs; vec += kProductVecs) {
    const auto at = [&](int r, int v) { return rows.raw + r * kTileKeys + lane0 + (vec + v) * kLanes; };
    for (int d = 0; d < rows.depth; d += rows.depth_step) {
      const int d_end = min_of(d + rows.depth_step, rows.depth);
      unroll<kRows>(FASTATTN_LAMBDA(r) { unroll<kProductVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = V::zero(); }); });
      gemm_tile(acc, rows.q + d, rows.stride_q, 1, tile.k + d * kTileKeys + lane0 + vec * kLanes, kTileKeys, d_end - d);
      if constexpr (kTerms<Operand> > 1) {
        // bfloat16 is multiplied as it came.
        const V factor = V::set1(rows.scores->dot_factor);
        unroll<kRows>(
            FASTATTN_LAMBDA(r) { unroll<kProductVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = acc[r][v] * factor; }); });
      }
      if (d > 0) {
        unroll<kRows>(FASTATTN_LAMBDA(r) {
          unroll<kProductVecs>(FASTATTN_LAMBDA(v) { acc[r][v] = acc[r][v] + V::load(at(r, v)); });
        });
      }
      if (d_end < rows.depth || !stays_in_registers) {
        unroll<kRows>(FASTATTN_LAMBDA(r) { unroll<kProductVecs>(FASTATTN_LAMBDA(v) { acc[r][v].store(at(r, v)); }); });
      }
    }
  }
  if (has_terms) add_score_terms(rows, tile, kRows);
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    V x[kVecs];
    if (stays_in_registers) {
      unroll<kProductVecs>(FASTATTN_LAMBDA(v) { x[v] = acc[r][v]; });
    } else {
      unroll<kVecs>(FASTATTN_LAMBDA(v) { x[v] = V::load(rows.raw + r * kTileKeys + lane0 + v * kLanes); });
    }
    if (!kPlain && mask.data) {
      unroll<kVecs>(FASTATTN_LAMBDA(v) { x[v] = x[v] + V::load(mask.row(r) + lane0 + v * kLanes); });
    }
    if constexpr (kHide) keep_lanes(x, tile.visible[r] >> lane0, -std::numeric_limits<T>::infinity());
    softmax_step(x, rows, r, tile.first);
    if (!kPlain && rows.dropout->active()) {
      const uint64_t kept =
          rows.dropout->kept_columns(rows.batch_head, static_cast<uint32_t>(rows.row0 + r), tile.key0);
      keep_lanes(x, kept >> lane0, T(0));
    }
    Operand* p = rows.p + (r * kTileKeys + lane0) / kTerms<Operand>;
    unroll<kVecs>(FASTATTN_LAMBDA(v) { store_left(p + v * kLanes / kTerms<Operand>, x[v]); });
  });
}

template <typename T, typename Operand>
__attribute__((noinline)) void add_score_terms(const RowBlock<T, Operand>& rows, const KeyTile<Operand>& tile,
                                               int count) {
  if (rows.scores->softcap != 0) rows.scores->cap(rows.raw, kTileKeys, count);
  rows.scores->add_terms(rows.raw, kTileKeys, rows.row0, count, tile.key0);
}

// out[r][0, kVecs vectors) (+)= sum over keys of p[r][key] * v[key], where `keys` counts elements of p.
template <int kRows, int kVecs, typename T, typename Operand, typename Element>
FASTATTN_INLINE void value_tile(const Operand* p, const Element* v, int64_t ld_v, int keys, T* out, int64_t ld_out,
                                bool first) {
  using V = Vec<T>;
  V acc[kRows][kVecs];
  unroll<kRows>(FASTATTN_LAMBDA(r) {
    unroll<kVecs>(FASTATTN_LAMBDA(c) { acc[r][c] = first ? V::zero() : V::load(out + r * ld_out + c * V::kLanes); });
  });
  gemm_tile(acc, p, kTileKeys / kTerms<Operand>, 1, v, ld_v, keys);
  unroll<kRows>(
      FASTATTN_LAMBDA(r) { unroll<kVecs>(FASTATTN_LAMBDA(c) { acc[r][c].store(out + r * ld_out + c * V::kLanes); }); });
}

// Keys [key_begin, key_end) of the tile; v points at the tile's first key, or pair of keys.
template <int kRows, typename T, typename Operand, typename Element>
__attribute__((noinline)) void accumulate_values(const RowBlock<T, Operand>& rows, const Element* v, int64_t ld_v,
                                                 int key_begin, int key_end, bool first) {
  constexpr int kLanes = Vec<T>::kLanes;
  // A key that shares a pair with one of the range has p = 0.
  key_begin /= kTerms<Operand>;
  const Operand* p = rows.p + key_begin;
  v += key_begin * ld_v;
  const int keys = static_cast<int>(elements_for<Operand>(key_end)) - key_begin;
  T* out = rows.out;
  int vecs = static_cast<int>(rows.ld_out) / kLanes;
  while (vecs > 0) {
    // 5 to 7 vectors are split evenly: a lone vector a row would leave the multipliers waiting for each other.
    const int step = vecs >= 2 * kTileVecs ? kTileVecs : vecs > kTileVecs ? (vecs + 1) / 2 : vecs;
    switch (step) {
      case 1:
        value_tile<kRows, 1>(p, v, ld_v, keys, out, rows.ld_out, first);
        break;
      case 2:
        value_tile<kRows, 2>(p, v, ld_v, keys, out, rows.ld_out, first);
        break;
      case 3:
        if constexpr (kTileVecs >= 3) value_tile<kRows, 3>(p, v, ld_v, keys, out, rows.ld_out, first);
        break;
      default:
        if constexpr (kTileVecs >= 4) value_tile<kRows, 4>(p, v, ld_v, keys, out, rows.ld_out, first);
    }
    v += step * kLanes;
    out += step * kLanes;
    vecs -= step;
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
