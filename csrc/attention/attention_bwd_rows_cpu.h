// What the backward knows of a row besides its probabilities: the sums over the row that ds is made of.
//   ds = p * ((dp - delta) + dlse),  delta = sum(p * dp) = dout . out
// Where delta and dp differ by less than either (few keys that matter, or values alike), only delta's rounding matters.
// While all keys of a row are at hand, delta is therefore summed up from the very p and dp that ds is computed from, as
// eager does, and p is divided by its sum, which takes back what lse lost when it was rounded. dlse is added to the
// difference: of a row with one key, ds is dlse and nothing else.
#pragma once

#include "attention/attention_operand_cpu.h"
#include "attention/attention_probs_cpu.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Of the rows of a tile. `weight` is what p has to be multiplied by; nullptr: 1.
template <typename T>
struct RowTerms {
  const T *delta, *dlse, *weight;
};

// A tile of p and of dp (before dropout), kTileKeys columns a row.
template <typename T>
struct ProbabilityTile {
  TilePlace place;
  const T *p, *dp;
};

// sums[r] = sum(p), dots[r] = sum(p * keep_scale * dp) over the keys that dropout kept, of `count` tiles with the same
// rows. The dp of hidden keys was never computed.
template <typename T>
__attribute__((noinline)) void sum_rows(T* sums, T* dots, const ProbabilityTile<T>* tiles, int count, int rows,
                                        T keep_scale) {
  using V = Vec<T>;
  for (int r = 0; r < rows; ++r) {
    V sum = V::zero(), dot = V::zero();
    for (int t = 0; t < count; ++t) {
      const T *p = tiles[t].p + r * kTileKeys, *dp = tiles[t].dp + r * kTileKeys;
      const TilePlace& place = tiles[t].place;
      if (!place.visible && !place.kept) {
        for (int key = 0; key < kTileKeys; key += V::kLanes) {
          const V x = V::load(p + key);
          sum = sum + x;
          dot = fma(x, V::load(dp + key), dot);
        }
        continue;
      }
      const uint64_t bits =
          (place.visible ? place.visible[r] : ~uint64_t{0}) & (place.kept ? place.kept[r] : ~uint64_t{0});
      for (int key = 0; key < kTileKeys; key += V::kLanes) {
        const auto counts = V::mask_from_bits(static_cast<uint32_t>(bits >> key));
        const V x = V::load(p + key);
        sum = sum + x;
        // Rounded as score_gradients rounds it.
        dot = fma(x, select(counts, V::load(dp + key) * V::set1(keep_scale), V::zero()), dot);
      }
    }
    sums[r] = sum.reduce_add();
    dots[r] = dot.reduce_add();
  }
}

// dots[r] = out_r . dout_r for a tile's rows, summed in chains of `chain` elements of Operand as the matrix product
// dout v^T sums: of a row that sees one key, out is that key's value, and dp - delta cancels exactly. Hence transposed.
template <typename Operand, typename T, typename Element>
__attribute__((noinline)) void row_dots(T* dots, const Element* out, int64_t stride_out, const Element* dout,
                                        int64_t stride_dout, int rows, int columns, int chain) {
  static_assert(kTileQueries == kTileKeys, "pack_keys transposes rows of queries");
  using V = Vec<T>;
  constexpr int kStep = 16;
  alignas(64) Operand out_t[kStep * kTileQueries], dout_t[kStep * kTileQueries];
  alignas(64) T pieces[kTileQueries];
  for (int r = 0; r < kTileQueries; ++r) dots[r] = pieces[r] = 0;
  int left = chain;  // of the piece's terms
  for (int c = 0; c < columns; c += kStep) {
    const int step = min_of(kStep, columns - c), elements = static_cast<int>(elements_for<Operand>(step));
    pack_keys(out_t, out + c, stride_out, rows, step);
    pack_keys(dout_t, dout + c, stride_dout, rows, step);
    for (int at = 0, end; at < elements; at = end) {
      end = min_of(elements, at + left);
      left -= end - at;
      const bool is_done = left == 0 || (end == elements && c + kStep >= columns);
      for (int r = 0; r < rows; r += V::kLanes) {
        V sum = V::load(pieces + r);
        for (int i = at; i < end; ++i) {
          sum = fma(Vec<Operand>::load_as(dout_t + i * kTileQueries + r),
                    Vec<Operand>::load_as(out_t + i * kTileQueries + r), sum);
        }
        (is_done ? V::zero() : sum).store(pieces + r);
        if (is_done) (V::load(dots + r) + sum).store(dots + r);
      }
      if (left == 0) left = chain;
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
