// What the Hopper backward's blocks share, whatever the head_dim: a block's keys, and the warp that feeds it with the
// query tiles that see them.
#pragma once

#include "attention/attention_bwd_dq_sum_sm90.cuh"
#include "attention/attention_bwd_order_sm90.cuh"
#include "attention/attention_bwd_probabilities_sm90.cuh"
#include "attention/attention_bwd_split_sm80.cuh"
#include "attention/attention_tile_sm90.cuh"

namespace fastattn {

// What the feeding warp tells the others of a stage.
struct BwdStageInfo {
  int head = -1, query_tile = 0;  // no head: there are no more stages
  int mask_number = 0;            // 0: attn_mask changes nothing; else this is the block's 1st, 2nd, ... tile of it
};

template <typename Traits>
using BwdTileKeys = BwdKeys<Traits::kBlockK>;

// What a block of packed sequences has of its own in shared memory. A dense one has no use for it.
template <typename Traits>
struct BwdPackedSmem {
  alignas(16) uint8_t args[Traits::kPacked ? sizeof(AttentionBwdSm90Args) : 16];
  BwdTileKeys<Traits> keys;
  int place;
  // Of tiles with rows to clear: the copies are done. Such a tile is full when its rows are zeros.
  uint64_t k_arrived, v_arrived, q_arrived[Traits::kStages], dout_arrived[Traits::kDoutStages];

  FASTATTN_DEVICE AttentionBwdSm90Args& own() { return *reinterpret_cast<AttentionBwdSm90Args*>(args); }
};

// threadIdx.x anew with each of a packed block's tiles, so that what is made of it does not take registers from tile to
// tile.
template <typename Traits>
FASTATTN_DEVICE int thread_of_tile() {
  const int thread = static_cast<int>(threadIdx.x);
  return Traits::kPacked ? opaque(thread) : thread;
}

// What a thread knows of its block's keys. Packed, the multiplying ones have no registers for them.
template <typename Traits>
using BwdBlockKeys = std::conditional_t<Traits::kPacked, const BwdTileKeys<Traits>&, const BwdTileKeys<Traits>>;

// `block` is blockIdx.x.
template <typename Traits, typename Smem>
FASTATTN_DEVICE BwdBlockKeys<Traits> keys_of_block(const Smem& smem, const AttentionBwdArgs& own,
                                                   [[maybe_unused]] int block = static_cast<int>(blockIdx.x)) {
  if constexpr (Traits::kPacked) {
    return smem.packed.keys;
  } else {
    return BwdTileKeys<Traits>(own, block);
  }
}

// Where the block's batch entry lies in the tensors that TMA knows. A packed sequence's rows are followed by the next
// one's, which are cleared in shared memory (attention_bwd_packed_sm90.cuh).
template <bool kPacked>
struct BwdEntry {
  int batch;
  FASTATTN_DEVICE BwdEntry(const AttentionBwdArgs&, int batch_) : batch(batch_) {}
  FASTATTN_DEVICE int of_map() const { return batch; }
  FASTATTN_DEVICE static int query_row(int query) { return query; }
  FASTATTN_DEVICE static int key_row(int key) { return key; }
  FASTATTN_DEVICE static constexpr bool ends_before(int, int) { return false; }
};

template <>
struct BwdEntry<true> {
  int first_query, first_key;
  FASTATTN_DEVICE BwdEntry(const AttentionBwdArgs& own, int batch)
      : first_query(static_cast<int>(packed_sequence(own.packed.q, batch, 0).begin)),
        first_key(static_cast<int>(packed_sequence(own.packed.k, batch, 0).begin)) {}
  FASTATTN_DEVICE static int of_map() { return 0; }
  FASTATTN_DEVICE int query_row(int query) const { return first_query + query; }
  FASTATTN_DEVICE int key_row(int key) const { return first_key + key; }
  FASTATTN_DEVICE static bool ends_before(int seqlen, int end) { return seqlen < end; }
};

// Of (batch, head) among the heads of statistics and dq's sums, which for packed sequences start with the block's own.
template <typename Traits>
FASTATTN_DEVICE int64_t statistics_head(const AttentionBwdArgs& own, int batch, int head) {
  return Traits::kPacked ? head : int64_t{batch} * own.heads + head;
}

// Tiles of attn_mask in what a block's other tiles leave of shared memory.
template <int kOtherBytes, int kBlockK, bool kCopiesMasks>
constexpr int bwd_mask_bytes() {
  constexpr int kSpare = 224 * 1024 - kOtherBytes, kMost = kMaxMaskStages * mask_stage_bytes(kBlockK, 4);
  return !kCopiesMasks ? 16 : kSpare < kMost ? kSpare : kMost;
}

// ---- the feeding warps

// Copies k and v once and then, stage by stage, q with lse and dO with delta. Smem has a place for each, and mbarriers.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void feed_bwd_stages(Smem& smem, const AttentionBwdArgs& args, const TensorMap* q_map,
                                     const TensorMap* k_map, const TensorMap* v_map, const TensorMap* dout_map) {
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileQ = typename Traits::TileQ;
  constexpr uint32_t kRowBytes = Traits::kBlockQ * 4;  // of lse or delta
  BwdBlockKeys<Traits> keys = keys_of_block<Traits>(smem, args);
  const bool is_leader = threadIdx.x % 32 == 0;
  const BwdEntry<Traits::kPacked> entry(args, keys.batch);
  if (is_leader) {
    const bool cleared = entry.ends_before(args.scores.seqlen_k, keys.first + Traits::kBlockK);
    const int row = entry.key_row(keys.first);
    uint64_t* const k_there = cleared ? &smem.packed.k_arrived : &smem.k_full;
    mbarrier_arrive_expect_tx(k_there, TileK::kBytes);
    load_tile_sm90<TileK>(smem.k, k_map, k_there, row, keys.head_kv, entry.of_map());
    uint64_t* const v_there = cleared ? &smem.packed.v_arrived : &smem.v_full;
    mbarrier_arrive_expect_tx(v_there, TileV::kBytes);
    load_tile_sm90<TileV>(smem.v, v_map, v_there, row, keys.head_kv, entry.of_map());
  }
  RingPosition<Traits::kStages> at;
  RingPosition<Traits::kDoutStages> dout_at;
  int masks = 0;
  // The lanes look for the next tile together.
  for (QueryTileWalk<Traits> walk(args, keys.batch, keys.head_kv, keys.tile, {keys.first, keys.first + keys.count},
                                  args.parts, keys.part);
       !walk.done(); walk.advance(), ++at.count, ++dout_at.count) {
    if (is_leader) {
      const int stage = at.stage(), dout_stage = dout_at.stage(), query = walk.tile * Traits::kBlockQ;
      const int64_t row = statistics_head<Traits>(args, keys.batch, walk.head) * args.padded_rows + query;
      const bool cleared = entry.ends_before(args.scores.seqlen_q, query + Traits::kBlockQ);
      const int tensor_row = entry.query_row(query);
      mbarrier_wait(&smem.q_empty[stage], at.parity() ^ 1);  // the first round finds every stage empty
      smem.info[stage] = {walk.head, walk.tile, walk.is_partial() ? ++masks : 0};
      uint64_t* const q_there = cleared ? &smem.packed.q_arrived[stage] : &smem.q_full[stage];
      mbarrier_arrive_expect_tx(q_there, TileQ::kBytes + kRowBytes);
      load_tile_sm90<TileQ>(smem.q[stage], q_map, q_there, tensor_row, walk.head, entry.of_map());
      bulk_load(smem.lse[stage], args.lse_log2 + row, kRowBytes, q_there);
      mbarrier_wait(&smem.dout_empty[dout_stage], dout_at.parity() ^ 1);
      uint64_t* const dout_there = cleared ? &smem.packed.dout_arrived[dout_stage] : &smem.dout_full[dout_stage];
      mbarrier_arrive_expect_tx(dout_there, TileQ::kBytes + kRowBytes);
      load_tile_sm90<TileQ>(smem.dout[dout_stage], dout_map, dout_there, tensor_row, walk.head, entry.of_map());
      bulk_load(smem.delta[dout_stage], args.delta + row, kRowBytes, dout_there);
    }
    __syncwarp();
  }
  if (is_leader) {
    mbarrier_wait(&smem.q_empty[at.stage()], at.parity() ^ 1);
    smem.info[at.stage()] = {};
    mbarrier_arrive(&smem.q_full[at.stage()]);
  }
}

// By a warp of its own, which waits for nothing else: the tiles of attn_mask that must be looked at.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void feed_bwd_masks(Smem& smem, const AttentionBwdArgs& args, const MaskStages& mask) {
  if (mask.count == 0) return;
  BwdBlockKeys<Traits> keys = keys_of_block<Traits>(smem, args);
  MaskRingPosition at;
  for (QueryTileWalk<Traits> walk(args, keys.batch, keys.head_kv, keys.tile, {keys.first, keys.first + keys.count},
                                  args.parts, keys.part);
       !walk.done(); walk.advance()) {
    if (!walk.is_partial()) continue;
    if (threadIdx.x % 32 == 0) {
      const int stage = at.stage(mask);
      mbarrier_wait(&smem.mask_empty[stage], at.parity(mask) ^ 1);
      load_mask_stage(smem.mask + stage * mask.stage_bytes, mask, &smem.mask_full[stage], walk.tile * Traits::kBlockQ,
                      keys.first, walk.head, keys.batch);
    }
    __syncwarp();
    ++at.count;
  }
}

// ---- what reads attn_mask

// The mask of a step, once it is there; `key` is this lane's first row of the accumulators.
template <typename Traits, typename Smem>
FASTATTN_DEVICE StepMask wait_for_mask(Smem& smem, const MaskStages& mask, BwdStageInfo info, int key) {
  if (info.mask_number == 0) return {};
  if (!Traits::kCopiesMasks || mask.count == 0) return {true};
  const MaskRingPosition at = {static_cast<uint32_t>(info.mask_number - 1)};
  const int stage = at.stage(mask);
  mbarrier_wait(&smem.mask_full[stage], at.parity(mask));
  return {true, &mask, smem.mask + stage * mask.stage_bytes, stage, key};
}

// Gives its stage back, by whole warps, if it was in one.
template <typename Smem>
FASTATTN_DEVICE void release_mask(Smem& smem, const StepMask& mask) {
  if (mask.stage_smem == nullptr) return;
  fence_proxy_async();  // it is read before the next one comes in its place
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(&smem.mask_empty[mask.stage]);
}

// P of S in a step; `row` is this lane's first of the accumulators, counted from the block's first key.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void make_step_probabilities(typename Traits::Scores& s, typename Traits::Operand& p, Smem& smem,
                                             const ScoreArgs& scores, const MaskStages& mask,
                                             const DropoutState& dropout, const BwdTileKeys<Traits>& keys,
                                             BwdStageInfo info, int row, const float* lse_smem) {
  const int query = info.query_tile * Traits::kBlockQ;
  const IndexRange all = band_of(scores).keys_seen_by_all({query, query + Traits::kBlockQ});
  // Keys that do not exist count as hidden too: k is 0 there, but dX must not be infinite.
  const bool is_cut = all.begin > keys.first || all.end < keys.first + Traits::kBlockK;
  const TransposedPlace place = {keys.first + row, query + lane_column(), keys.batch, info.head};
  StepMask step_mask;
  if constexpr (Traits::kHasMask) step_mask = wait_for_mask<Traits>(smem, mask, info, row);
  make_probabilities<Traits>(s, p, scores, dropout, place, is_cut, lse_smem, step_mask);
  if constexpr (Traits::kHasMask) release_mask(smem, step_mask);
}

// ---- few keys

// What this block knows of dk or dv, where others have more of it: fp32 sums of a warp's 16 keys, the first of which is
// `warp_row`. Each sequence has room for `longest` keys.
template <typename Traits, typename Smem>
FASTATTN_DEVICE void store_shared_sums(const typename Traits::Gradient& gradient, float factor, const Smem& smem,
                                       const AttentionBwdArgs& args, int longest, bool of_dv, int warp_row) {
  // Unknown to the compiler, which would otherwise make the addresses ahead of all steps and keep them.
  BwdBlockKeys<Traits> keys = keys_of_block<Traits>(smem, args, opaque(static_cast<int>(blockIdx.x)));
  const int64_t batch_head = int64_t{keys.batch} * args.heads_kv + keys.head_kv;
  const int64_t key = batch_head * longest + keys.first + warp_row;
  store_part(gradient, factor, args.parts.sums(of_dv, keys.part) + key * args.parts.columns, args.parts.columns,
             keys.count - warp_row);
}

// ---- turns in adding to dq

// How many blocks of keys add to these queries before this one: the visible ones among those of smaller keys.
template <typename Traits>
FASTATTN_DEVICE int turn_of_block(const AttentionBwdArgs& args, const BwdTileKeys<Traits>& keys, BwdStageInfo info) {
  const int query = info.query_tile * Traits::kBlockQ;
  const IndexRange seen =
      band_of(args.scores).keys_seen_by_any({query, min(query + Traits::kBlockQ, args.scores.seqlen_q)});
  const int first_tile = static_cast<int>(seen.begin) / Traits::kBlockK;
  int turn = keys.tile - first_tile;
  const MaskTiles& tiles = args.mask_tiles;
  if (Traits::kHasMask && tiles.state != nullptr) {
    const MaskTileState* state = tiles.state + keys.batch * tiles.stride_batch + info.head * tiles.stride_head +
                                 info.query_tile * tiles.stride_row_tile;
    for (int tile = first_tile; tile < keys.tile; ++tile) turn -= state[tile] == MaskTileState::kHidden ? 1 : 0;
  }
  return turn;
}

}  // namespace fastattn
