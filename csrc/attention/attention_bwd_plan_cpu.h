// How the CPU backward divides its work and which tensors it multiplies where they are: what follows from shapes,
// strides and the number of threads.
#pragma once

#include <cstring>
#include <type_traits>

#include "attention/attention.h"
#include "attention/attention_bwd_tile_cpu.h"
#include "attention/attention_packed_cpu.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Tiles of keys whose p and dp a block of rows holds at once, at most; most_tiles_at_hand() says for which widths.
constexpr int kMostTilesAtHand = 4;

template <typename Element>
FASTATTN_INLINE Element* row_of(const AttentionTensor& tensor, int64_t batch, int64_t head, int64_t row) {
  return static_cast<Element*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head +
         row * tensor.stride_row;
}

template <typename T, typename Element>
FASTATTN_INLINE void store_rows(Element* dst, int64_t stride, Rows<const T> src, int rows, int columns) {
  using V = Vec<T>;
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < columns; c += V::kLanes) {
      V::load(src.data + row * src.stride + c).store_as_partial(dst + row * stride + c, columns - c);
    }
  }
}

template <typename T>
FASTATTN_INLINE void set_zero(T* data, int64_t count) {
  std::memset(static_cast<void*>(data), 0, static_cast<size_t>(count) * sizeof(T));
}

// Of a call, where packed sequences count as the longest of them; or of one batch entry, which entry() makes of it.
template <typename T, typename Element, typename Operand>
struct BackwardPlan {
  static constexpr bool kPairs = kTerms<Operand> > 1;

  FASTATTN_INLINE explicit BackwardPlan(const AttentionBwdParams& params)
      : p(params),
        group(params.heads / params.heads_kv),
        width(whole_vectors<T>(params.head_dim)),
        width_v(whole_vectors<T>(params.head_dim_v)),
        depth(elements_for<Operand>(params.head_dim)),
        depth_v(elements_for<Operand>(params.head_dim_v)),
        threads(max_threads()) {
    // Of packed sequences, as many as there were if all had the greatest length.
    const int64_t entries = is_packed(p) ? (p.packed_q.total + p.seqlen_q - 1) / p.seqlen_q : p.batch;
    const int64_t pairs = entries * p.heads_kv;
    splits = threads > 1 && pairs % threads != 0 && pairs < 4 * threads && p.seqlen_k > kTileKeys;
    count_blocks();
    most_query_blocks = query_blocks;
  }

  FASTATTN_INLINE BackwardPlan entry(int64_t batch) const {
    BackwardPlan one = *this;
    narrow_to_entry(one.p, batch);
    one.count_blocks();
    return one;
  }

  FASTATTN_INLINE int64_t tiles() const { return (p.seqlen_k + kTileKeys - 1) / kTileKeys; }
  FASTATTN_INLINE int64_t most_tiles_at_hand() const {
    const int64_t widest = max_of(width, width_v);
    return widest <= 64 ? kMostTilesAtHand : widest <= 128 ? 3 : 2;
  }
  // The blocks of rows of the query heads that share a key head.
  FASTATTN_INLINE int64_t row_blocks() const { return group * query_blocks; }
  FASTATTN_INLINE int64_t tasks_a_pair() const {
    if (!splits) return 1;
    return sees_all_keys ? max_of<int64_t>(row_blocks(), 1) : key_blocks;
  }

  // The kernels can work on the tensor itself if it is made of T and its rows are whole vectors without gaps: a power
  // of two between rows would put them all into a few sets of L1.
  FASTATTN_INLINE bool is_direct(const AttentionTensor& tensor, int64_t columns) const {
    return std::is_same_v<T, Element> && columns % Vec<T>::kLanes == 0 && tensor.stride_row == columns;
  }
  // The same for q and dout as left operands.
  FASTATTN_INLINE bool is_left(const AttentionTensor& tensor, int64_t columns) const {
    return is_left_operand<Operand, Element>(tensor.stride_row, columns);
  }

  AttentionBwdParams p;
  int64_t group;
  // Rows of q, k and of v, out in whole vectors.
  int64_t width, width_v;
  // How many elements of Operand hold head_dim and head_dim_v terms.
  int64_t depth, depth_v;
  int threads;
  // True: threads share the heads, each working on other keys.
  bool splits;
  // True: a task holds the probabilities of its rows for all keys, and threads that share a head work on other rows.
  // Must not depend on the number of threads: it changes roundings.
  bool sees_all_keys;
  int64_t block_tiles, key_blocks, query_blocks;
  int64_t most_query_blocks;  // of the longest sequence

 private:
  // A sequence without keys has one block without keys, for dq.
  FASTATTN_INLINE void count_blocks() {
    const int64_t widest = max_of(width, width_v);
    sees_all_keys = tiles() <= most_tiles_at_hand();
    // About 256 KiB of keys, values and their gradients; small blocks where threads share a head, to start them early.
    const int64_t usual = splits ? 1 : widest <= 64 ? 4 : widest <= 128 ? 2 : 1;
    block_tiles = sees_all_keys ? max_of<int64_t>(tiles(), 1) : usual;
    query_blocks = (p.seqlen_q + kTileQueries - 1) / kTileQueries;
    key_blocks = max_of<int64_t>(1, (tiles() + block_tiles - 1) / block_tiles);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
