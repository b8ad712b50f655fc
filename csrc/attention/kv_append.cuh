// A step of decoding before its attention, in one kernel: new keys and values go to the cache, and queries and keys are
// rotated by their positions.
// Work:    a thread has a piece of a row: pairs of elements to rotate, or elements to copy. blockIdx.y is the operand.
// Numbers: rotated in fp32, rounded once.
// Source:  Su et al., arXiv:2104.09864.
#pragma once

#include "attention/kv_cache.h"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace fastattn {

constexpr int kAppendThreads = 128;

struct KvAppendArgs : KvAppendParams {
  int sequence_blocks = 0;  // blocks for one sequence, of the operand that needs most
};

// The row of `to` for token `token` of sequence `batch`, head 0.
template <typename Element>
FASTATTN_DEVICE Element* appended_row(const KvCache& cache, const AppendedRows& rows, int batch, int token) {
  Element* to = static_cast<Element*>(rows.to.data);
  if (!rows.to_cache) return to + batch * rows.to.stride_batch + token * rows.to.stride_row;
  const int place = tokens_before(cache, batch) + token, block = place / cache.block_size;
  return to + cache_entry(cache, batch, block) * rows.to.stride_batch +
         (place - block * cache.block_size) * rows.to.stride_row;
}

// Pairs [pair, pair + kVec) of a row.
template <bool kInterleaved, int kVec, typename Element, typename Angle>
FASTATTN_DEVICE void rotate_pairs(const Element* from, Element* to, const Angle* cos, const Angle* sin, int pair,
                                  int pairs) {
  const int first = kInterleaved ? 2 * pair : pair, second = kInterleaved ? first + kVec : first + pairs;
  const Vec<Element, kVec> read[2] = {load_vec<kVec>(from + first), load_vec<kVec>(from + second)};
  Vec<Element, kVec> rotated[2];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    // Of pair i: which vector each of its two elements is in, and where.
    const int vec_a = kInterleaved ? 2 * i / kVec : 0, vec_b = kInterleaved ? (2 * i + 1) / kVec : 1;
    const int place_a = kInterleaved ? 2 * i % kVec : i, place_b = kInterleaved ? (2 * i + 1) % kVec : i;
    const float a = to_float(read[vec_a][place_a]), b = to_float(read[vec_b][place_b]);
    const float c = to_float(cos[pair + i]), s = to_float(sin[pair + i]);
    rotated[vec_a][place_a] = from_float<Element>(a * c - b * s);
    rotated[vec_b][place_b] = from_float<Element>(a * s + b * c);
  }
  store_vec(to + first, rotated[0]);
  store_vec(to + second, rotated[1]);
}

// kVec: elements that every row can be read and written by at a time, 8 or 1; a piece is two of these vectors.
template <typename Element, typename Angle, int kVec>
__global__ void __launch_bounds__(kAppendThreads) kv_append_kernel(const __grid_constant__ KvAppendArgs p) {
  const AppendedRows& rows = p.operands[blockIdx.y];
  const int head_dim = static_cast<int>(rows.head_dim), pieces = (head_dim + 2 * kVec - 1) / (2 * kVec);
  const int batch = static_cast<int>(blockIdx.x) / p.sequence_blocks;
  const int index =
      (static_cast<int>(blockIdx.x) - batch * p.sequence_blocks) * kAppendThreads + static_cast<int>(threadIdx.x);
  const int heads = static_cast<int>(rows.heads), row = index / pieces, piece = index - row * pieces;
  const int token = row / heads, head = row - token * heads;
  if (token >= rows.tokens) return;

  const Element* from = static_cast<const Element*>(rows.from.data) + batch * rows.from.stride_batch +
                        head * rows.from.stride_head + token * rows.from.stride_row;
  Element* to = appended_row<Element>(p.cache, rows, batch, token) + head * rows.to.stride_head;
  const int pair = piece * kVec, pairs = rows.is_rotated ? static_cast<int>(p.rotary_dim) / 2 : 0;
  if (pair < pairs) {
    const int64_t asked = tokens_before(p.cache, batch) + int64_t{token};
    const int64_t position = asked < p.positions ? asked : p.positions - 1;
    const Angle* cos = static_cast<const Angle*>(p.cos) + position * p.stride_cos;
    const Angle* sin = static_cast<const Angle*>(p.sin) + position * p.stride_sin;
    if (p.is_interleaved) {
      rotate_pairs<true, kVec>(from, to, cos, sin, pair, pairs);
    } else {
      rotate_pairs<false, kVec>(from, to, cos, sin, pair, pairs);
    }
    return;
  }
  for (int col = 2 * pair; col < min(2 * pair + 2 * kVec, head_dim); col += kVec) {
    store_vec(to + col, load_vec<kVec>(from + col));
  }
}

}  // namespace fastattn
