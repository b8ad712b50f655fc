// Packed sequences on CUDA: a block's arguments become those of the sequence it works on, and rows that no sequence has
// are cleared.
#pragma once

#include <type_traits>

#include "attention/attention_scores.cuh"
#include "attention/packed.h"
#include "common/launch.cuh"

namespace fastattn {

// cu_seqlens are null in a dense batch.
struct PackedSequences {
  PackedRows q, k;
  bool bottom_right = false;
};

FASTATTN_HOST_DEVICE bool is_packed(const PackedSequences& packed) { return packed.q.cu_seqlens != nullptr; }

inline PackedSequences packed_sequences(const AttentionParams& p) {
  return {p.packed_q, p.packed_k, p.packed_bottom_right};
}

// ---- one sequence's arguments

// Its first rows in the tensors.
struct EntryRows {
  int64_t query = 0, key = 0;
};

// Lengths, so far those of the longest sequences, and diagonal become those of batch entry `batch`. It keeps its
// number, by which dropout and ALiBi know it.
FASTATTN_DEVICE EntryRows narrow_to_entry(ScoreArgs& scores, const PackedSequences& packed, int64_t batch) {
  const IndexRange queries = packed_sequence(packed.q, batch, scores.seqlen_q);
  const IndexRange keys = packed_sequence(packed.k, batch, scores.seqlen_k);
  scores.seqlen_q = static_cast<int>(queries.end - queries.begin);
  scores.seqlen_k = static_cast<int>(keys.end - keys.begin);
  scores.diagonal = packed.bottom_right ? scores.seqlen_k - scores.seqlen_q : 0;
  return {queries.begin, keys.begin};
}

// `own`, which differs from args in an entry's lengths, for a tile of scores: all else comes from constant memory,
// where operands take no registers.
template <typename Traits>
FASTATTN_DEVICE std::conditional_t<Traits::kPacked, ScoreArgs, const ScoreArgs&> tile_scores(const ScoreArgs& args,
                                                                                             const ScoreArgs& own) {
  if constexpr (Traits::kPacked) {
    ScoreArgs scores = args;
    scores.seqlen_q = own.seqlen_q, scores.seqlen_k = own.seqlen_k, scores.diagonal = own.diagonal;
    return scores;
  } else {
    return own;
  }
}

// Of a tensor of 16-bit elements.
FASTATTN_DEVICE void skip_rows(AttentionTensor& tensor, int64_t rows) {
  tensor.data = static_cast<uint16_t*>(tensor.data) + rows * tensor.stride_row;
}

// The traits of a kernel for packed sequences: behind the tiles lie the block's own arguments. Lengths and addresses
// that differ from block to block would take registers through the loops, where large tiles have none to spare. In
// shared memory they cost a load where they are used.
template <typename Traits, typename Args>
struct PackedTraits : Traits {
  static constexpr bool kPacked = true, kNoMask = true;
  static constexpr int kArgsAt = Traits::kSmemBytes;
  static constexpr int kSmemBytes = kArgsAt + static_cast<int>(sizeof(Args));
  static_assert(kArgsAt % 16 == 0 && sizeof(Args) % sizeof(uint32_t) == 0);
};

// A copy of args at `smem`, narrowed to batch entry `batch`. All threads of a block come here.
template <typename Args>
FASTATTN_DEVICE const Args& share_entry(uint8_t* smem, const Args& args, int batch) {
  Args& own = *reinterpret_cast<Args*>(smem);
  constexpr int kWords = sizeof(Args) / sizeof(uint32_t);
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<uint32_t*>(smem)[i] = reinterpret_cast<const uint32_t*>(&args)[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) narrow_to_entry(own, batch);
  __syncthreads();
  return own;
}

// The arguments of a block that works on batch entry `batch`: a copy narrowed to it; in a dense batch args themselves.
template <typename Traits, typename Args>
FASTATTN_DEVICE const Args& entry_args(const Args& args, int batch) {
  if constexpr (Traits::kPacked) {
    FASTATTN_DYNAMIC_SMEM(smem);
    return share_entry(smem + Traits::kArgsAt, args, batch);
  } else {
    return args;
  }
}

// ---- rows that no sequence has: behind the last one, or wherever lengths leave some out

// A (total, heads, columns) tensor of 16-bit elements.
struct PackedTensor {
  AttentionTensor tensor;
  PackedRows rows;
  int64_t longest = 0, heads = 0, columns = 0;
};

struct ClearGapsArgs {
  static constexpr int kMostTensors = 3;
  PackedTensor tensors[kMostTensors];
  int64_t batch = 0;
  float* lse = nullptr;       // (heads, total) of the first tensor: -inf
  int* next_place = nullptr;  // also set to 0, if not null, for the kernel that is launched next
};

constexpr int kClearGapsThreads = 256;
// For the gap behind the last sequence; each other gap has one block, since correct lengths leave it no rows.
constexpr int kLastGapBlocks = 32;

// A tensor in y, a gap between two sequences or a part of the last gap in x.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) clear_gaps_kernel(const __grid_constant__ ClearGapsArgs args) {
  if (args.next_place != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *args.next_place = 0;
  const PackedTensor& packed = args.tensors[blockIdx.y];
  const int64_t block = blockIdx.x, gap = block < args.batch ? block : args.batch;
  const IndexRange rows = packed_gap(packed.rows, gap, args.batch, packed.longest);
  const int64_t first = (block - gap) * kThreads + threadIdx.x;
  const int64_t step = int64_t{gap == args.batch ? kLastGapBlocks : 1} * kThreads;
  const int64_t count = rows.end - rows.begin, row_elems = packed.heads * packed.columns;
  const AttentionTensor& tensor = packed.tensor;
  for (int64_t i = first; i < count * row_elems; i += step) {
    const int64_t row = rows.begin + i / row_elems, head = i % row_elems / packed.columns;
    static_cast<uint16_t*>(tensor.data)[row * tensor.stride_row + head * tensor.stride_head + i % packed.columns] = 0;
  }
  if (args.lse == nullptr) return;
  for (int64_t i = first; i < count * packed.heads; i += step) {
    args.lse[i % packed.heads * packed.rows.total + rows.begin + i / packed.heads] = -INFINITY;
  }
}

// Null, or why the launch failed.
inline const char* launch_clear_gaps(const ClearGapsArgs& args, int tensors, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.batch + kLastGapBlocks), static_cast<unsigned>(tensors));
  return launch_kernel(clear_gaps_kernel<kClearGapsThreads>, grid, kClearGapsThreads, 0, stream, args);
}

inline const char* clear_forward_gaps(const AttentionParams& p, int* next_place, cudaStream_t stream) {
  if (!is_packed(p)) return nullptr;
  ClearGapsArgs args;
  args.tensors[0] = {p.out, p.packed_q, p.seqlen_q, p.heads, p.head_dim_v};
  args.batch = p.batch;
  args.lse = static_cast<float*>(p.lse);
  args.next_place = next_place;
  return launch_clear_gaps(args, 1, stream);
}

inline const char* clear_backward_gaps(const AttentionBwdParams& p, cudaStream_t stream) {
  if (!is_packed(p)) return nullptr;
  ClearGapsArgs args;
  args.tensors[0] = {p.dq, p.packed_q, p.seqlen_q, p.heads, p.head_dim};
  args.tensors[1] = {p.dk, p.packed_k, p.seqlen_k, p.heads_kv, p.head_dim};
  args.tensors[2] = {p.dv, p.packed_k, p.seqlen_k, p.heads_kv, p.head_dim_v};
  args.batch = p.batch;
  return launch_clear_gaps(args, 3, stream);
}

}  // namespace fastattn
