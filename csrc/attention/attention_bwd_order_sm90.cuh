// Which keys a block of Hopper's backward owns, and for packed sequences in which order blocks take them.
//
// A dense batch has a block for each tile of keys. Of packed sequences only the device knows how many tiles there are:
// a kernel lists the sequences, those with most queries first, since each of their tiles takes that long, and blocks
// that stay take the next place of the list when they have done with one. So there are no tiles without keys, and what
// comes last is short.
//
//   place     sequence of the list, section of key heads whose q and dO fit the L2 cache together, tile, key head, part
//             of the queries: of the causal triangle, too, what takes longest comes first, and of a head smaller keys,
//             as turns of adding to dq want them
#pragma once

#include "attention/attention_bwd_sm80.cuh"
#include "attention/attention_fwd_order.cuh"
#include "common/launch.cuh"

namespace fastattn {

// ---- the list

// One of the packed sequences, in the order of the work on them.
struct BwdOrderEntry {
  int sequence, first_tile;  // tiles of keys, of one head, of all sequences before it
};

struct BwdOrder {
  // Null in a dense batch, else one for each sequence. All lie in the workspace.
  BwdOrderEntry* entries = nullptr;
  int* tiles = nullptr;                      // of one head, of all sequences
  int* next_place = nullptr;                 // that no block has taken yet
  int sequences = 0, heads_per_section = 1;  // of key heads

  // Its two counters lie in front of the list.
  static int64_t workspace_bytes(int64_t sequences) { return (2 + 2 * sequences) * static_cast<int64_t>(sizeof(int)); }
  static BwdOrder in(uint8_t* workspace, int64_t sequences, int64_t heads_per_section) {
    int* const numbers = reinterpret_cast<int*>(workspace);
    return {reinterpret_cast<BwdOrderEntry*>(numbers + 2), numbers, numbers + 1, static_cast<int>(sequences),
            static_cast<int>(heads_per_section)};
  }

  // The sequence to which tile `tile` of the list belongs: the last that starts at or before it. One without tiles
  // starts where the next one does.
  FASTATTN_DEVICE BwdOrderEntry entry_of(int tile) const {
    int low = 0, high = sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (entries[middle].first_tile <= tile ? low : high) = middle;
    }
    return entries[low];
  }
};

// Eight classes between powers of two; class 0 has most queries.
struct QueryClass {
  static constexpr int kCount = 256;
  FASTATTN_DEVICE static int of(int64_t queries) {
    constexpr int kExponentOfOne = 127;
    const int eighths = __float_as_int(static_cast<float>(queries + 1)) >> 20;  // of the exponent
    return kCount - 1 - (eighths - 8 * kExponentOfOne);
  }
};
static_assert(kMaxCudaSeqlen < int64_t{1} << (QueryClass::kCount / 8 - 1), "a class for each length");

// Lists the sequences by a counting sort, and starts the counters: one block.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_order_kernel(const BwdOrder order, const PackedSequences packed, int longest_q, int longest_k,
                               int block_k) {
  static_assert(kThreads == QueryClass::kCount, "a thread for each class");
  // Of a class: sequences in the upper half, tiles in the lower, so that one addition counts both.
  using Counts = unsigned long long;
  FASTATTN_SHARED(before, Counts[kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  const auto count = [&](int sequence) {
    const IndexRange queries = packed_sequence(packed.q, sequence, longest_q);
    const IndexRange keys = packed_sequence(packed.k, sequence, longest_k);
    const auto tiles = static_cast<int>(keys.end - keys.begin + block_k - 1) / block_k;
    return atomicAdd(&before[QueryClass::of(queries.end - queries.begin)],
                     Counts{1} << 32 | static_cast<Counts>(tiles));
  };

  before[thread] = 0;
  __syncthreads();
  for (int sequence = thread; sequence < order.sequences; sequence += kThreads) count(sequence);
  __syncthreads();
  const Counts own = before[thread];
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const Counts left = thread >= distance ? before[thread - distance] : 0;
    __syncthreads();
    before[thread] += left;
    __syncthreads();
  }
  if (thread == kThreads - 1) {
    *order.tiles = static_cast<int>(before[thread]);
    *order.next_place = 0;
  }
  __syncthreads();
  before[thread] -= own;
  __syncthreads();
  for (int sequence = thread; sequence < order.sequences; sequence += kThreads) {
    const Counts place = count(sequence);
    order.entries[place >> 32] = {sequence, static_cast<int>(place)};
  }
}

// ---- a block's keys, and which part of the queries that see them it has

template <int kBlockK>
struct BwdKeys {
  int batch, head_kv, tile, first, count, part;

  // Of the arguments of a dense batch.
  FASTATTN_DEVICE explicit BwdKeys(const AttentionBwdArgs& args, int block = static_cast<int>(blockIdx.x)) {
    // The causal diagonal lets the first keys be seen by most queries: they go first. Where blocks take turns, those
    // before this one have started earlier; so do all parts of smaller keys, whichever of them has a query tile.
    const int keys = block / args.parts.count();
    part = block - keys * args.parts.count();
    tile = keys % args.key_tiles;
    const int batch_head = keys / args.key_tiles;
    batch = batch_head / args.heads_kv, head_kv = batch_head % args.heads_kv;
    first = tile * kBlockK, count = min(kBlockK, args.scores.seqlen_k - first);
  }

  // At a place of packed sequences.
  FASTATTN_DEVICE BwdKeys(const AttentionBwdArgs& args, const BwdOrder& order, int place) {
    const int keys = place / args.parts.count();
    part = place - keys * args.parts.count();
    const BwdOrderEntry entry = order.entry_of(keys / args.heads_kv);
    batch = entry.sequence;
    const IndexRange range = packed_sequence(args.packed.k, batch, args.scores.seqlen_k);
    const int seqlen_k = static_cast<int>(range.end - range.begin), tiles = (seqlen_k + kBlockK - 1) / kBlockK;
    const int head_tile = keys - entry.first_tile * args.heads_kv;
    const int first_head = head_tile / (tiles * order.heads_per_section) * order.heads_per_section;
    const int heads = min(order.heads_per_section, args.heads_kv - first_head);
    const int within = head_tile - first_head * tiles;
    tile = within / heads, head_kv = first_head + within - tile * heads;
    first = tile * kBlockK, count = min(kBlockK, seqlen_k - first);
  }

  BwdKeys() = default;
};

// How many places packed sequences have.
FASTATTN_DEVICE int bwd_places(const AttentionBwdArgs& args, const BwdOrder& order) {
  return *order.tiles * args.heads_kv * args.parts.count();
}

}  // namespace fastattn
