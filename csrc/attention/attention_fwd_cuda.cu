// Launches the attention forward: chooses a tile, packs heads, splits the keys, and finds the empty tiles of the mask.
#include "attention/attention_combine.cuh"
#include "attention/attention_fwd_choice.h"
#include "attention/attention_fwd_launch.cuh"
#include "attention/attention_fwd_sm90_launch.cuh"
#include "attention/attention_mask_tiles_launch.cuh"

namespace fastattn {

extern template const char* launch_fwd_tile<half_t, 32>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<half_t, 64>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<half_t, 96>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<half_t, 128>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<half_t, 192>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<half_t, 256>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 32>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 64>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 96>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 128>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 192>(int, const AttentionFwdArgs&, dim3, cudaStream_t);
extern template const char* launch_fwd_tile<bfloat16_t, 256>(int, const AttentionFwdArgs&, dim3, cudaStream_t);

#define FASTATTN_FWD_CACHED(Element, head_dim)                                                               \
  extern template const char* launch_fwd_cached<Element, head_dim>(ScoreKind, const AttentionFwdArgs&, dim3, \
                                                                   cudaStream_t);
FASTATTN_FWD_CACHED(half_t, 64)
FASTATTN_FWD_CACHED(half_t, 128)
FASTATTN_FWD_CACHED(half_t, 256)
FASTATTN_FWD_CACHED(bfloat16_t, 64)
FASTATTN_FWD_CACHED(bfloat16_t, 128)
FASTATTN_FWD_CACHED(bfloat16_t, 256)
#undef FASTATTN_FWD_CACHED

#define FASTATTN_FWD_SM90(Element, head_dim) \
  extern template const char* launch_fwd_sm90_tile<Element, head_dim>(int, const AttentionFwdArgs&, int, cudaStream_t);
FASTATTN_FWD_SM90(half_t, 64)
FASTATTN_FWD_SM90(half_t, 96)
FASTATTN_FWD_SM90(half_t, 128)
FASTATTN_FWD_SM90(half_t, 192)
FASTATTN_FWD_SM90(half_t, 256)
FASTATTN_FWD_SM90(bfloat16_t, 64)
FASTATTN_FWD_SM90(bfloat16_t, 96)
FASTATTN_FWD_SM90(bfloat16_t, 128)
FASTATTN_FWD_SM90(bfloat16_t, 192)
FASTATTN_FWD_SM90(bfloat16_t, 256)
#undef FASTATTN_FWD_SM90

namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Everything about a call that its workspace and its launch must agree on.
struct FwdPlan {
  int tile = -1;        // of kFwdTiles, ...
  int sm90_tile = -1;   // ... unless this one of kFwdSm90Tiles
  bool cached = false;  // then a tile of 64 x 64 stands for the kernel with keys and values in a cache, of this kind
  ScoreKind kind = ScoreKind::kPlain;
  int group = 1;
  int64_t tile_heads = 0, row_tiles = 0, blocks = 0;
  int splits = 1;
  int64_t partial_stride = 0, partial_out_bytes = 0, partial_lse_bytes = 0;
  MaskTilesPlan mask_tiles;
  int64_t counter_bytes = 0;  // of packed sequences on Hopper, which have neither parts nor masks

  int64_t workspace_bytes() const { return partial_out_bytes + partial_lse_bytes + mask_tiles.bytes + counter_bytes; }
};

// Heads that share k and v are packed into the rows that a short sequence would leave empty.
int heads_packed(const AttentionParams& p) {
  constexpr int64_t kShort = 32;
  return p.seqlen_q <= kShort ? static_cast<int>(p.heads / p.heads_kv) : 1;
}

// A tile of 64 rows where there are no more or where heads are packed: half of a larger one would be idle. Kernels for
// caches have these alone.
int choose_tile(const AttentionParams& p, const DeviceLaunch& launch) {
  const int64_t head_dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const ScoreKind kind = score_kind(p);
  const bool needs_small = p.seqlen_q <= 64 || is_cached(p);
  constexpr size_t kLargeSmem = 160 * 1024;
  for (int i = 0; i < kFwdTileCount; ++i) {
    const FwdTile& tile = kFwdTiles[i];
    if (tile.head_dim < head_dim || tile.kind < kind || (needs_small && tile.kind == ScoreKind::kPlain)) continue;
    if (!tile.is_for(launch.compute_capability) || (is_packed(p) && !tile.packed)) continue;
    if (tile.large_smem && launch.shared_bytes_per_block < kLargeSmem) continue;
    const int smem_bytes = is_packed(p) ? tile.packed_smem_bytes() : tile.smem_bytes();
    if (static_cast<size_t>(smem_bytes) > launch.shared_bytes_per_block) continue;
    return i;
  }
  return -1;
}

// The most key tiles that a row tile visits.
int64_t visible_key_tiles(const AttentionParams& p, int64_t queries, int64_t block_k) {
  const int64_t seen = p.window_left + p.window_right + queries;
  return ceil_div(min_of(p.seqlen_k, seen < 0 ? 0 : seen), block_k);
}

// How many blocks share the keys of one row tile, so that the card is filled. Of the candidates, each of which costs
// its partial results, the smallest that keeps the card 85 % as busy as the best.
int choose_splits(int64_t blocks, int64_t key_tiles, int64_t slots) {
  constexpr int64_t kMinTiles = 2;
  if (blocks * 5 >= slots * 4) return 1;
  const int64_t most = min_of(kMaxSplits, key_tiles / kMinTiles);
  const auto busy = [&](int64_t splits) {
    const int64_t rounds = ceil_div(blocks * splits, slots) * ceil_div(key_tiles, splits);
    return static_cast<double>(blocks * key_tiles) / static_cast<double>(rounds * slots);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) best = busy(splits) > best ? busy(splits) : best;
  for (int64_t splits = 1; splits <= most; ++splits) {
    if (busy(splits) >= 0.85 * best) return static_cast<int>(splits);
  }
  return 1;
}

// Of the Hopper kernel: heads that share k and v are packed into rows where that leaves a tenth fewer rows of its tiles
// idle. A box of its tensor maps has all of a group, or a part, for the same number of queries; that of a mask has 64
// queries of a head, so the mask must be the same for all (key padding).
int heads_packed_sm90(const AttentionParams& p) {
  constexpr int64_t kBlockQ = 128;
  const int64_t group = p.heads / p.heads_kv, head_dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const bool is_power_of_two = (group & (group - 1)) == 0;
  const bool one_mask_row = p.mask.data == nullptr || (p.mask.stride_q == 0 && p.mask.stride_head == 0);
  // Of a packed sequence, whose length only the device knows, half of the last tile is idle in the mean.
  const int64_t queries = is_packed(p) ? p.packed_q.total / p.batch : p.seqlen_q;
  const auto rows = [&](int64_t used) { return is_packed(p) ? used + kBlockQ / 2 : ceil_div(used, kBlockQ) * kBlockQ; };
  const bool pays = 10 * rows(queries * group) <= 9 * group * rows(queries) && p.seqlen_q * group <= kMaxCudaSeqlen;
  if (!one_mask_row || !is_power_of_two || group > 64 || !pays) return 1;
  for (const FwdSm90Tile& tile : kFwdSm90Tiles) {
    if (tile.head_dim < head_dim) continue;
    return fwd_sm90_packs_heads(tile.head_dim, score_kind(p)) ? static_cast<int>(group) : 1;
  }
  return 1;
}

// A tile of kFwdSm90Tiles, or why there is none.
struct Sm90Choice {
  int tile = -1;
  const char* refusal = nullptr;
};

// The Hopper kernel takes what its tensor maps can describe, of packed sequences all of them at once, and what fills
// the card without split keys.
Sm90Choice choose_sm90_tile(const AttentionParams& p, const DeviceLaunch& launch, int64_t group) {
  const int64_t rows = p.seqlen_q * group;
  if (launch.compute_capability != 90) return {-1, "the card is none of compute capability 9.0"};
  if (rows <= 64) return {-1, "a head, or the heads that share keys, have no more than 64 rows of queries"};
  const int64_t batch = is_packed(p) ? 1 : p.batch, batch_k = is_cached(p) ? p.cache.entries : batch;
  const int64_t rows_q = is_packed(p) ? p.packed_q.total : p.seqlen_q;
  const int64_t rows_k = is_cached(p) ? p.cache.block_size : is_packed(p) ? p.packed_k.total : p.seqlen_k;
  constexpr int64_t kMostRows = INT32_MAX - 256;  // positions of boxes that reach past the end are 32-bit numbers
  if (rows_q > kMostRows || rows_k > kMostRows || !tma_can_address(p.q, batch, p.heads, rows_q, p.head_dim) ||
      !tma_can_address(p.k, batch_k, p.heads_kv, rows_k, p.head_dim) ||
      !tma_can_address(p.v, batch_k, p.heads_kv, rows_k, p.head_dim_v) ||
      !tma_can_address(p.out, batch, p.heads, rows_q, p.head_dim_v)) {
    return {-1, "TMA cannot address an operand: rows must be 16-byte aligned, and nothing expanded or empty"};
  }
  const int64_t head_dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const Sequences sequences = is_cached(p) ? Sequences::kCached : is_packed(p) ? Sequences::kPacked : Sequences::kDense;
  for (int i = 0; i < kFwdSm90TileCount; ++i) {
    const FwdSm90Tile& tile = kFwdSm90Tiles[i];
    if (!tile.serves(head_dim, score_kind(p), rows) || !tile.has(sequences)) continue;
    const int block_k = tile.block_k_of(sequences);
    if (is_cached(p) && cached_box_rows(p.cache, block_k) == 0) return {-1, "block_size is not a multiple of 8"};
    const int64_t blocks = p.batch * (p.heads / group) * ceil_div(rows, tile.block_q());
    const int64_t key_tiles = visible_key_tiles(p, min_of(p.seqlen_q, tile.block_q()), block_k);
    if (choose_splits(blocks, key_tiles, launch.multiprocessors) == 1) return {i};
    return {-1, "rows of queries are too few to fill the card, so blocks share the keys of a row"};
  }
  return {-1, "no tile of it fits head_dim"};
}

FwdPlan plan_fwd(const AttentionParams& p, const DeviceLaunch& launch) {
  FwdPlan plan;
  plan.tile = choose_tile(p, launch);
  if (plan.tile < 0) return plan;
  plan.cached = is_cached(p);
  plan.kind = score_kind(p);
  const int packed = heads_packed_sm90(p);
  plan.sm90_tile = choose_sm90_tile(p, launch, packed).tile;
  if (plan.sm90_tile >= 0) {
    const FwdSm90Tile& tile = kFwdSm90Tiles[plan.sm90_tile];
    plan.group = packed;
    plan.tile_heads = p.heads / packed;
    plan.row_tiles = ceil_div(p.seqlen_q * packed, tile.block_q());
    plan.blocks = p.batch * plan.tile_heads * plan.row_tiles;
    plan.mask_tiles = plan_mask_tiles(p, tile.block_q(), tile.block_k, plan.group);
    if (is_packed(p)) plan.counter_bytes = sizeof(int);
    return plan;
  }
  const FwdTile& tile = kFwdTiles[plan.tile];
  const int64_t block_q = tile.block_q();
  plan.group = heads_packed(p);
  plan.tile_heads = p.heads / plan.group;
  plan.row_tiles = ceil_div(p.seqlen_q * plan.group, block_q);
  plan.blocks = p.batch * plan.tile_heads * plan.row_tiles;

  const int64_t slots = 2 * static_cast<int64_t>(launch.multiprocessors);
  const int64_t queries = min_of(p.seqlen_q, ceil_div(block_q, plan.group) + 1);
  plan.splits = choose_splits(plan.blocks, visible_key_tiles(p, queries, tile.block_k), slots);
  if (plan.splits > 1) {
    const int64_t rows = plan.splits * p.batch * p.heads * p.seqlen_q;
    plan.partial_stride = ceil_div(p.head_dim_v, 8) * 8;
    plan.partial_out_bytes = ceil_div(rows * plan.partial_stride * 4, 256) * 256;
    plan.partial_lse_bytes = ceil_div(rows * 4, 256) * 256;
  }
  plan.mask_tiles = plan_mask_tiles(p, static_cast<int>(block_q), tile.block_k, plan.group);
  return plan;
}

FwdOrder order_of(const AttentionParams& p, const FwdPlan& plan) {
  const int64_t bytes = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v);
  // On Hopper a packed sequence is a section or more of its own.
  const int64_t entries = is_packed(p) && plan.sm90_tile >= 0 ? 1 : p.batch;
  const int64_t heads = kv_heads_per_section(entries * p.heads_kv, bytes) * (plan.tile_heads / p.heads_kv);
  return {static_cast<int>(p.batch), static_cast<int>(plan.tile_heads), static_cast<int>(plan.row_tiles),
          static_cast<int>(heads)};
}

template <typename Element>
const char* launch_fwd(const FwdPlan& plan, const AttentionFwdArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
  const int head_dim = kFwdTiles[plan.tile].head_dim;
  const char* error =
      plan.cached
          ? launch_choice<64, 128, 256>(
                head_dim, [&](auto dim) { return launch_fwd_cached<Element, dim()>(plan.kind, args, grid, stream); })
          : launch_choice<32, 64, 96, 128, 192, 256>(
                head_dim, [&](auto dim) { return launch_fwd_tile<Element, dim()>(plan.tile, args, grid, stream); });
  if (error != nullptr || plan.splits == 1) return error;
  return launch_combine_splits<Element>(args, stream);
}

template <typename Element>
const char* launch_fwd_hopper(const FwdPlan& plan, const AttentionFwdArgs& args, const DeviceLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return launch_choice<64, 96, 128, 192, 256>(kFwdSm90Tiles[plan.sm90_tile].head_dim, [&](auto head_dim) {
    return launch_fwd_sm90_tile<Element, head_dim()>(plan.sm90_tile, args, launch.multiprocessors, stream);
  });
}

}  // namespace

size_t attention_fwd_cuda_workspace_bytes(const AttentionParams& p, const DeviceLaunch& launch) {
  return static_cast<size_t>(plan_fwd(p, launch).workspace_bytes());
}

const char* attention_fwd_sm90_refusal(const AttentionParams& p, const DeviceLaunch& launch) {
  return choose_sm90_tile(p, launch, heads_packed_sm90(p)).refusal;
}

const char* attention_fwd_cuda(const AttentionParams& p, const DeviceLaunch& launch) {
  AttentionFwdArgs args;
  if (const char* error = make_score_args(args.scores, p)) return error;
  const FwdPlan plan = plan_fwd(p, launch);
  if (plan.tile < 0) return "no tile of the forward fits head_dim and this card";
  if (plan.blocks > INT32_MAX || p.batch * p.heads > INT32_MAX) return "batch * heads is too large";

  args.q = p.q, args.k = p.k, args.v = p.v, args.out = p.out;
  args.lse = static_cast<float*>(p.lse);
  args.sinks = static_cast<const float*>(p.sinks);
  args.packed = packed_sequences(p);
  args.batch = static_cast<int>(p.batch), args.heads = static_cast<int>(p.heads);
  args.heads_kv = static_cast<int>(p.heads_kv);
  args.head_dim = static_cast<int>(p.head_dim), args.head_dim_v = static_cast<int>(p.head_dim_v);
  args.out_is_aligned = rows_are_aligned(p.out, p.head_dim_v);
  args.group = plan.group, args.group_inverse = inverse_of_group(plan.group);
  args.order = order_of(p, plan);
  args.splits = plan.splits;
  args.partial_stride = static_cast<int>(plan.partial_stride);
  auto* workspace = static_cast<uint8_t*>(launch.workspace);
  args.partial_out = reinterpret_cast<float*>(workspace);
  args.partial_lse = reinterpret_cast<float*>(workspace + plan.partial_out_bytes);

  auto* mask_states = reinterpret_cast<MaskTileState*>(workspace + plan.partial_out_bytes + plan.partial_lse_bytes);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  args.cache = p.cache;
  args.cache_is_aligned = rows_are_aligned(p.k, p.head_dim) && rows_are_aligned(p.v, p.head_dim_v);
  args.mask_tiles = mask_tiles(plan.mask_tiles, p, mask_states);
  if (const char* error = launch_mask_tiles(plan.mask_tiles, args.scores, mask_states, stream)) return error;
  if (plan.counter_bytes > 0) args.next_place = reinterpret_cast<int*>(workspace);
  if (const char* error = clear_forward_gaps(p, args.next_place, stream)) return error;
  if (plan.sm90_tile >= 0) {
    return p.dtype == DType::kFloat16 ? launch_fwd_hopper<half_t>(plan, args, launch)
                                      : launch_fwd_hopper<bfloat16_t>(plan, args, launch);
  }
  return p.dtype == DType::kFloat16 ? launch_fwd<half_t>(plan, args, stream)
                                    : launch_fwd<bfloat16_t>(plan, args, stream);
}

}  // namespace fastattn
