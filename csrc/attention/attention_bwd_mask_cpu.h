// The gradient of an additive mask: the gradients of the scores, summed over the dimensions in which the mask
// broadcast.
// One that broadcasts over keys moves all scores of a row alike, so the row's probabilities stay as they are but for
// the sink's, and the sum over its keys needs no key:
//   sum_j ds_j = dlse * sum_j p_j + p_sink * delta        (delta = dout . out, as in attention_bwd_rows_cpu.h)
// which is exact where the sum of ds, whose terms cancel, would be nothing but their roundings.
#pragma once

#include "attention/attention_bwd_tile_cpu.h"
#include "attention/ordered_turns.h"
#include "common/parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

enum class MaskGradientKind { kNone, kFull, kPerKey, kPerRow };

// kFull: the mask has rows and keys; a tile is added to the place of its (batch, head), and where several share it,
// they take turns in rising order. kPerKey, kPerRow: it broadcasts over rows, over keys (or both, or has one); each
// (batch, head) has a vector of its own, and reduce() adds the vectors.
template <typename T>
class MaskGradient {
 public:
  FASTATTN_INLINE static MaskGradientKind kind_of(const AttentionBwdParams& p) {
    if (p.dmask == nullptr) return MaskGradientKind::kNone;
    if (p.stride_dmask_k == 0 || p.seqlen_k == 1) return MaskGradientKind::kPerRow;
    return p.stride_dmask_q == 0 ? MaskGradientKind::kPerKey : MaskGradientKind::kFull;
  }
  // How many (batch, head) there are to one place of the mask.
  FASTATTN_INLINE static int64_t sharers(const AttentionBwdParams& p) {
    return (p.stride_dmask_batch == 0 ? p.batch : 1) * (p.stride_dmask_head == 0 ? p.heads : 1);
  }
  FASTATTN_INLINE static int64_t partial_count(const AttentionBwdParams& p) {
    const MaskGradientKind kind = kind_of(p);
    if (kind == MaskGradientKind::kPerKey) return p.batch * p.heads * p.seqlen_k;
    return kind == MaskGradientKind::kPerRow ? p.batch * p.heads * p.seqlen_q : 0;
  }

  // `partials` are zero.
  FASTATTN_INLINE MaskGradient(const AttentionBwdParams& p, double* partials)
      : p_(p), kind_(kind_of(p)), partials_(partials), sharers_(sharers(p)) {}

  FASTATTN_INLINE MaskGradientKind kind() const { return kind_; }
  FASTATTN_INLINE bool takes_tiles() const {
    return kind_ == MaskGradientKind::kFull || kind_ == MaskGradientKind::kPerKey;
  }
  FASTATTN_INLINE bool takes_turns() const { return kind_ == MaskGradientKind::kFull && sharers_ > 1; }
  // Which of the places that are shared, and whose turn it is there.
  FASTATTN_INLINE int64_t place(int64_t batch, int64_t head) const {
    return (p_.stride_dmask_batch == 0 ? 0 : batch) * (p_.stride_dmask_head == 0 ? 1 : p_.heads) +
           (p_.stride_dmask_head == 0 ? 0 : head);
  }
  FASTATTN_INLINE int32_t turn(int64_t batch, int64_t head) const {
    return static_cast<int32_t>((p_.stride_dmask_batch == 0 ? batch : 0) * (p_.stride_dmask_head == 0 ? p_.heads : 1) +
                                (p_.stride_dmask_head == 0 ? head : 0));
  }

  // Asks for the tile's place, if it has one of its own, well before add_tile.
  FASTATTN_INLINE void prefetch(int64_t batch, int64_t head, const TilePlace& place) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    if (kind_ != MaskGradientKind::kFull) return;
    for (int r = 0; r < place.rows; ++r) {
      const T* row = tile_row(batch, head, place, r);
      for (int key = 0; key < place.keys; key += kLine) __builtin_prefetch(row + key, /*to write=*/1);
    }
  }

  // ds: kTileKeys columns a row; nullptr for a hidden tile, whose gradients are 0.
  FASTATTN_INLINE void add_tile(const T* ds, int64_t batch, int64_t head, const TilePlace& place) const {
    const int64_t batch_head = batch * p_.heads + head;
    switch (kind_) {
      case MaskGradientKind::kNone:
      case MaskGradientKind::kPerRow:
        return;
      case MaskGradientKind::kFull:
        return add_full(ds, batch, head, place);
      case MaskGradientKind::kPerKey:
        if (ds) add_columns(partials_ + batch_head * p_.seqlen_k + place.key0, ds, place);
        return;
    }
  }

  // The whole gradient of a row, where the mask broadcasts over keys.
  FASTATTN_INLINE void set_row(int64_t batch, int64_t head, int64_t row, double gradient) const {
    if (kind_ == MaskGradientKind::kPerRow) partials_[(batch * p_.heads + head) * p_.seqlen_q + row] = gradient;
  }

  // Adds the vectors of all (batch, head) that share a place, in rising order.
  FASTATTN_INLINE void reduce() const {
    if (kind_ != MaskGradientKind::kPerKey && kind_ != MaskGradientKind::kPerRow) return;
    const bool per_key = kind_ == MaskGradientKind::kPerKey;
    const bool sums_rows = !per_key && p_.stride_dmask_q == 0;
    const int64_t length = per_key ? p_.seqlen_k : p_.seqlen_q, results = sums_rows ? 1 : length;
    const int64_t batches = p_.stride_dmask_batch == 0 ? 1 : p_.batch, heads = p_.stride_dmask_head == 0 ? 1 : p_.heads;
    T* dmask = static_cast<T*>(p_.dmask);
    parallel_ranges(batches * heads * results, 256, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t at = item % results, head = item / results % heads, batch = item / results / heads;
        double sum = 0;
        for (int64_t b = batch; b < (p_.stride_dmask_batch == 0 ? p_.batch : batch + 1); ++b) {
          for (int64_t h = head; h < (p_.stride_dmask_head == 0 ? p_.heads : head + 1); ++h) {
            const double* partial = partials_ + (b * p_.heads + h) * length;
            for (int64_t i = sums_rows ? 0 : at; i < (sums_rows ? length : at + 1); ++i) sum += partial[i];
          }
        }
        dmask[batch * p_.stride_dmask_batch + head * p_.stride_dmask_head +
              at * (per_key ? p_.stride_dmask_k : p_.stride_dmask_q)] = static_cast<T>(sum);
      }
    });
  }

 private:
  FASTATTN_INLINE T* tile_row(int64_t batch, int64_t head, const TilePlace& place, int r) const {
    return static_cast<T*>(p_.dmask) + batch * p_.stride_dmask_batch + head * p_.stride_dmask_head +
           (place.row0 + r) * p_.stride_dmask_q + place.key0;
  }

  FASTATTN_INLINE void add_full(const T* ds, int64_t batch, int64_t head, const TilePlace& place) const {
    using V = Vec<T>;
    const bool first = turn(batch, head) == 0;
    if (ds == nullptr && !first) return;
    T* row = tile_row(batch, head, place, 0);
    for (int r = 0; r < place.rows; ++r, row += p_.stride_dmask_q) {
      for (int key = 0; key < place.keys; key += V::kLanes) {
        const int lanes = place.keys - key;
        V x = ds ? V::load(ds + r * kTileKeys + key) : V::zero();
        if (lanes >= V::kLanes) {
          (first ? x : x + V::load(row + key)).store(row + key);
        } else {
          (first ? x : x + V::load_partial(row + key, lanes)).store_partial(row + key, lanes);
        }
      }
    }
  }

  // Eight rows at a time, pairwise: as long a chain as the tile is high would lose more than eager does.
  FASTATTN_INLINE static void add_columns(double* sums, const T* ds, const TilePlace& place) {
    using V = Vec<T>;
    alignas(64) T column[V::kLanes];
    for (int key = 0; key < place.keys; key += V::kLanes) {
      V total = V::zero();
      for (int r = 0; r < place.rows; r += 8) {
        V x[8];
        unroll<8>(
            FASTATTN_LAMBDA(i) { x[i] = r + i < place.rows ? V::load(ds + (r + i) * kTileKeys + key) : V::zero(); });
        unroll<4>(FASTATTN_LAMBDA(i) { x[i] = x[i] + x[i + 4]; });
        total = total + ((x[0] + x[2]) + (x[1] + x[3]));
      }
      total.store(column);
      for (int i = 0; i < min_of(V::kLanes, place.keys - key); ++i) sums[key + i] += column[i];
    }
  }

  const AttentionBwdParams& p_;
  MaskGradientKind kind_;
  double* partials_;
  int64_t sharers_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
