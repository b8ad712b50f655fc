// Launches the attention backward: chooses tiles, plans the workspace, and starts the kernels one after another.
#include "attention/attention_bwd_dmask_sm80.cuh"
#include "attention/attention_bwd_launch.cuh"
#include "attention/attention_bwd_rows_sm80.cuh"
#include "attention/attention_bwd_sm90_launch.cuh"
#include "attention/attention_mask_tiles_launch.cuh"

namespace fastattn {

#define FASTATTN_EXTERN_BWD(Element, kHeadDim)                                                           \
  extern template const char* launch_bwd_dkv_tile<Element, kHeadDim>(int, const AttentionBwdArgs&, dim3, \
                                                                     cudaStream_t);                      \
  extern template const char* launch_bwd_dq_tile<Element, kHeadDim>(int, const AttentionBwdArgs&, dim3, cudaStream_t)
FASTATTN_EXTERN_BWD(half_t, 64);
FASTATTN_EXTERN_BWD(half_t, 96);
FASTATTN_EXTERN_BWD(half_t, 128);
FASTATTN_EXTERN_BWD(half_t, 192);
FASTATTN_EXTERN_BWD(half_t, 256);
FASTATTN_EXTERN_BWD(bfloat16_t, 64);
FASTATTN_EXTERN_BWD(bfloat16_t, 96);
FASTATTN_EXTERN_BWD(bfloat16_t, 128);
FASTATTN_EXTERN_BWD(bfloat16_t, 192);
FASTATTN_EXTERN_BWD(bfloat16_t, 256);
#undef FASTATTN_EXTERN_BWD
FASTATTN_BWD_SM90_UNIT(extern, half_t, 64)
FASTATTN_BWD_SM90_UNIT(extern, half_t, 96)
FASTATTN_BWD_SM90_UNIT(extern, half_t, 128)
FASTATTN_BWD_SM90_UNIT(extern, half_t, 192)
FASTATTN_BWD_SM90_UNIT(extern, half_t, 256)
FASTATTN_BWD_SM90_UNIT(extern, bfloat16_t, 64)
FASTATTN_BWD_SM90_UNIT(extern, bfloat16_t, 96)
FASTATTN_BWD_SM90_UNIT(extern, bfloat16_t, 128)
FASTATTN_BWD_SM90_UNIT(extern, bfloat16_t, 192)
FASTATTN_BWD_SM90_UNIT(extern, bfloat16_t, 256)

namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
size_t aligned_bytes(int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 256) * 256); }

// Everything about a call that its workspace and its launches must agree on.
struct BwdPlan {
  BwdSm90Tile sm90_tile;            // serves dq, dk and dv where it has a head_dim, else
  int dkv_tile = -1, dq_tile = -1;  // these
  int64_t padded_rows = 0;          // of the longest sequence
  int64_t packed_rows = 0, statistics = 0;
  int64_t dq_sum_bytes = 0, turns_bytes = 0;  // of Hopper's dq
  int64_t order_bytes = 0;                    // of its packed sequences
  MaskTilesPlan dkv_mask_tiles, dq_mask_tiles;
  BwdParts parts;  // of dk and dv
  TileIndex dmask_places = {1, 1, 1, 1}, dmask_sharers = {1, 1, 1, 1};
  int dmask_splits = 1;
  int64_t dmask_elements = 0;
  int row_sum_parts = 0;  // of dS, which correct delta for fp32 gradients; Hopper's lie with its dq

  size_t row_bytes() const { return aligned_bytes(statistics * 4); }
  size_t dmask_bytes() const { return dmask_splits > 1 ? aligned_bytes(dmask_splits * dmask_elements * 4) : 0; }
  size_t parts_bytes() const { return parts.count() > 1 ? aligned_bytes(2 * parts.count() * parts.elements * 4) : 0; }
  size_t workspace_bytes() const {
    return parts_bytes() + 2 * row_bytes() + aligned_bytes(dkv_mask_tiles.bytes) + aligned_bytes(dq_mask_tiles.bytes) +
           dmask_bytes() + row_sum_parts * row_bytes() + aligned_bytes(dq_sum_bytes) + aligned_bytes(turns_bytes) +
           aligned_bytes(order_bytes);
  }
  int dq_sum_columns() const { return sm90_tile.head_dim + (sm90_tile.sums_rows ? DqSum::kRowSumParts : 0); }
  bool is_on_hopper() const { return sm90_tile.head_dim > 0; }
  bool has_kernels() const { return is_on_hopper() || (dkv_tile >= 0 && dq_tile >= 0); }
};

template <typename Tile, int kCount, typename SmemBytes>
int choose_tile(const Tile (&tiles)[kCount], SmemBytes smem_bytes, const AttentionParams& p, const DeviceLaunch& launch,
                int first = 0) {
  const int64_t head_dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  for (int i = first; i < kCount; ++i) {
    const bool fits = tiles[i].is_for(launch.compute_capability, is_packed(p)) &&
                      static_cast<size_t>(smem_bytes(i)) <= launch.shared_bytes_per_block;
    if (fits && tiles[i].head_dim >= head_dim && tiles[i].kind >= score_kind(p)) return i;
  }
  return -1;
}

// Whether the gradient of the mask follows from rows alone.
bool is_row_mask(const AttentionBwdParams& p) {
  return p.dmask != nullptr && (p.stride_dmask_k == 0 || p.seqlen_k == 1);
}

// Whether a gradient in float32 is made of delta: one of rows alone takes it for the share of the sink.
bool needs_exact_delta(const AttentionBwdParams& p) {
  return p.dsinks != nullptr || (p.dmask != nullptr && (p.sinks != nullptr || !is_row_mask(p)));
}

// How many blocks share the tiles of scores of one place of the mask: enough for four blocks a multiprocessor.
void plan_dmask(BwdPlan& plan, const AttentionBwdParams& p, const DeviceLaunch& launch) {
  const int batch = static_cast<int>(p.batch), heads = static_cast<int>(p.heads);
  const int query_tiles = static_cast<int>(ceil_div(p.seqlen_q, kDmaskTile));
  const int key_tiles = static_cast<int>(ceil_div(p.seqlen_k, kDmaskTile));
  const bool per_batch = p.stride_dmask_batch != 0, per_head = p.stride_dmask_head != 0;
  const bool per_query = p.stride_dmask_q != 0;
  plan.dmask_places = {per_batch ? batch : 1, per_head ? heads : 1, per_query ? query_tiles : 1, key_tiles};
  plan.dmask_sharers = {per_batch ? 1 : batch, per_head ? 1 : heads, per_query ? 1 : query_tiles, 1};
  plan.dmask_elements =
      (per_batch ? p.batch : 1) * (per_head ? p.heads : 1) * (per_query ? p.seqlen_q : 1) * p.seqlen_k;
  const int64_t wanted = ceil_div(4 * static_cast<int64_t>(launch.multiprocessors), plan.dmask_places.count());
  constexpr int64_t kMostSplits = 1024;
  plan.dmask_splits = static_cast<int>(min_of(min_of(wanted, plan.dmask_sharers.count()), kMostSplits));
}

int choose_dkv_tile(const AttentionBwdParams& p, const DeviceLaunch& launch, int first = 0) {
  return choose_tile(kBwdDkvTiles, [](int i) { return bwd_dkv_smem_bytes(i); }, p, launch, first);
}

// The tile of a kernel that makes dk and dv, and what writing its fp32 sums and adding them up costs: about as much
// time as so many queries.
struct DkvTile {
  int64_t keys, queries, sum_cost;
};
DkvTile dkv_tile(int tile) { return {kBwdDkvTiles[tile].block_k(), kBwdDkvTiles[tile].block_q, 256}; }
DkvTile dkv_tile(const BwdSm90Tile& tile) { return {tile.block_k(), tile.block_q(), 384}; }

// The most query tiles of a head that see a block of keys.
int64_t query_tiles(const AttentionBwdParams& p, const DkvTile& tile) {
  const int64_t seen = min_of(p.seqlen_q, p.window_left + p.window_right + tile.keys);
  return ceil_div(seen < 1 ? 1 : seen, tile.queries);
}

// The time of the busiest multiprocessor, counted in queries.
int64_t dkv_cost(const AttentionBwdParams& p, const DkvTile& tile, const BwdParts& parts, int64_t slots) {
  const int64_t blocks = p.batch * p.heads_kv * ceil_div(p.seqlen_k, tile.keys) * parts.count();
  const int64_t work = ceil_div(p.heads / p.heads_kv, parts.heads) * ceil_div(query_tiles(p, tile), parts.tiles);
  return ceil_div(blocks, slots) * (work * tile.queries + (parts.count() > 1 ? tile.sum_cost : 0));
}

// The parts into which the queries of a block of keys are best divided, if that costs less than `limit`; else one.
BwdParts best_parts(const AttentionBwdParams& p, const DkvTile& tile, int64_t slots, int64_t limit) {
  constexpr int64_t kMostParts = 16;
  const int64_t group = p.heads / p.heads_kv, most = min_of(kMostParts, group * query_tiles(p, tile));
  BwdParts best;
  for (int64_t wanted = 2; wanted <= most; ++wanted) {
    // Heads first: each of their parts has the same work whatever the mask.
    BwdParts parts;
    parts.heads = static_cast<int>(min_of(wanted, group)), parts.tiles = static_cast<int>(wanted / parts.heads);
    const int64_t cost = dkv_cost(p, tile, parts, slots);
    if (cost >= limit) continue;
    limit = cost;
    best = parts;
  }
  best.columns = static_cast<int>(ceil_div(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, 8) * 8);
  best.elements = p.batch * p.heads_kv * p.seqlen_k * best.columns;
  return best;
}

// Lets blocks share the queries of a block of keys where that saves a tenth or more, by another tile if need be.
void choose_parts(BwdPlan& plan, const AttentionBwdParams& p, const DeviceLaunch& launch) {
  const int64_t slots = launch.multiprocessors;
  if (plan.is_on_hopper()) {
    const DkvTile tile = dkv_tile(plan.sm90_tile);
    plan.parts = best_parts(p, tile, slots, dkv_cost(p, tile, {}, slots) * 9 / 10);
    return;
  }
  const int64_t limit = dkv_cost(p, dkv_tile(plan.dkv_tile), {}, slots) * 9 / 10;
  int shared = plan.dkv_tile;
  if (!kBwdDkvTiles[shared].shares) shared = choose_dkv_tile(p, launch, shared + 1);
  if (!kBwdDkvTiles[shared].shares) return;
  plan.parts = best_parts(p, dkv_tile(shared), slots, limit);
  if (plan.parts.count() > 1) plan.dkv_tile = shared;
}

BwdPlan plan_bwd(const AttentionBwdParams& p, const DeviceLaunch& launch) {
  BwdPlan plan;
  plan.padded_rows = ceil_div(p.seqlen_q, kRowPadding) * kRowPadding;
  plan.packed_rows = is_packed(p) ? packed_statistics_rows(p.batch, p.packed_q.total) : 0;
  plan.statistics = p.heads * (is_packed(p) ? plan.packed_rows : p.batch * plan.padded_rows);
  if (p.dmask != nullptr && !is_row_mask(p)) plan_dmask(plan, p, launch);
  const bool sums_rows = needs_exact_delta(p);
  plan.sm90_tile = choose_bwd_sm90_tile(p, launch, sums_rows);
  if (plan.is_on_hopper()) {
    plan.dkv_mask_tiles = plan_mask_tiles(p, plan.sm90_tile.block_q(), plan.sm90_tile.block_k(), 1);
    plan.dq_sum_bytes = plan.statistics * plan.dq_sum_columns() * 4;
    plan.turns_bytes = launch.deterministic ? plan.statistics / DqSum::kRows * 2 * 4 : 0;
    plan.order_bytes = is_packed(p) ? BwdOrder::workspace_bytes(p.batch) : 0;
    choose_parts(plan, p, launch);
    return plan;
  }
  plan.dkv_tile = choose_dkv_tile(p, launch);
  plan.dq_tile = choose_tile(kBwdDqTiles, [](int i) { return bwd_dq_smem_bytes(i); }, p, launch);
  if (!plan.has_kernels()) return plan;
  choose_parts(plan, p, launch);
  const BwdDkvTile& dkv = kBwdDkvTiles[plan.dkv_tile];
  const BwdDqTile& dq = kBwdDqTiles[plan.dq_tile];
  plan.dkv_mask_tiles = plan_mask_tiles(p, dkv.block_q, dkv.block_k(), 1);
  plan.dq_mask_tiles = plan_mask_tiles(p, dq.block_q(), dq.block_k, 1);
  if (sums_rows) plan.row_sum_parts = dq.key_parts;
  return plan;
}

AttentionBwdArgs make_args(const BwdPlan& plan, const AttentionBwdParams& p, const BwdRowStatistics& rows) {
  AttentionBwdArgs args;
  args.q = p.q, args.k = p.k, args.v = p.v, args.dout = p.dout;
  args.dq = p.dq, args.dk = p.dk, args.dv = p.dv;
  args.lse_log2 = rows.lse_log2, args.delta = rows.delta;
  args.row_sums = const_cast<float*>(rows.row_sums), args.row_sums_part = rows.row_sums_part;
  args.padded_rows = is_packed(p) ? rows.packed_rows : rows.padded_rows;
  args.packed = packed_sequences(p);
  args.heads = static_cast<int>(p.heads), args.heads_kv = static_cast<int>(p.heads_kv);
  args.head_dim = static_cast<int>(p.head_dim), args.head_dim_v = static_cast<int>(p.head_dim_v);
  args.scale = static_cast<float>(p.scale);
  args.dq_is_aligned = rows_are_aligned(p.dq, p.head_dim);
  args.dk_is_aligned = rows_are_aligned(p.dk, p.head_dim);
  args.dv_is_aligned = rows_are_aligned(p.dv, p.head_dim_v);
  if (plan.is_on_hopper()) {
    args.key_tiles = static_cast<int>(ceil_div(p.seqlen_k, plan.sm90_tile.block_k()));
  } else {
    args.query_tiles = static_cast<int>(ceil_div(p.seqlen_q, kBwdDqTiles[plan.dq_tile].block_q()));
    args.key_tiles = static_cast<int>(ceil_div(p.seqlen_k, kBwdDkvTiles[plan.dkv_tile].block_k()));
  }
  return args;
}

// ---- one function a kernel

template <typename Element>
const char* launch_rows(const AttentionBwdParams& p, const BwdRowStatistics& rows, cudaStream_t stream) {
  const bool aligned = rows_are_aligned(p.out, p.head_dim_v) && rows_are_aligned(p.dout, p.head_dim_v);
  const auto blocks = static_cast<unsigned>(p.batch * p.heads * rows.padded_rows / kRowsPerBlock);
  return launch_kernel(aligned ? attention_bwd_rows_kernel<Element, true> : attention_bwd_rows_kernel<Element, false>,
                       blocks, kRowStatisticsThreads, 0, stream, p, rows);
}

// The gradients that follow from rows alone, once delta is as exact as it gets.
const char* launch_row_gradients(const AttentionBwdParams& p, const BwdRowStatistics& rows, cudaStream_t stream) {
  const char* error = nullptr;
  if (rows.row_sums != nullptr) {
    const auto blocks = static_cast<unsigned>(p.batch * p.heads * rows.padded_rows / kDeltaThreads);
    error = launch_kernel(attention_bwd_delta_kernel<kDeltaThreads>, blocks, kDeltaThreads, 0, stream, p, rows);
  }
  if (error == nullptr && p.dsinks != nullptr) {
    error = launch_kernel(attention_bwd_sinks_kernel<kSinkWarps>, static_cast<unsigned>(p.heads), 32 * kSinkWarps, 0,
                          stream, p, rows);
  }
  if (error != nullptr || !is_row_mask(p)) return error;
  const int64_t places = (p.stride_dmask_batch == 0 ? 1 : p.batch) * (p.stride_dmask_head == 0 ? 1 : p.heads) *
                         (p.stride_dmask_q == 0 ? 1 : p.seqlen_q);
  if (places > INT32_MAX) return "the mask is too large";
  const auto blocks = static_cast<unsigned>(places);
  return p.stride_dmask_q == 0
             ? launch_kernel(attention_bwd_row_mask_kernel<kSinkWarps>, blocks, 32 * kSinkWarps, 0, stream, p, rows)
             : launch_kernel(attention_bwd_row_mask_kernel<1>, blocks, 32, 0, stream, p, rows);
}

// Adds up what blocks that share queries have left of dk and dv.
template <typename Element>
const char* launch_dkv_sum(const AttentionBwdArgs& args, cudaStream_t stream) {
  if (args.parts.count() == 1) return nullptr;
  DkvSumArgs sum;
  sum.parts = args.parts;
  sum.dk = args.dk, sum.dv = args.dv;
  sum.chunks = args.parts.elements / 8;
  sum.heads_kv = args.heads_kv, sum.seqlen_k = args.scores.seqlen_k;
  sum.head_dim = args.head_dim, sum.head_dim_v = args.head_dim_v;
  sum.packed_k = args.packed.k;
  sum.dk_is_aligned = args.dk_is_aligned, sum.dv_is_aligned = args.dv_is_aligned;
  const dim3 sum_grid(static_cast<unsigned>(ceil_div(sum.chunks, kDkvSumThreads)), 2);
  return launch_kernel(attention_bwd_dkv_sum_kernel<Element>, sum_grid, kDkvSumThreads, 0, stream, sum);
}

template <typename Element>
const char* launch_dkv(const BwdPlan& plan, const AttentionBwdArgs& args, unsigned blocks, cudaStream_t stream) {
  const dim3 grid(blocks, static_cast<unsigned>(args.parts.count()));
  const char* error = launch_choice<64, 96, 128, 192, 256>(kBwdDkvTiles[plan.dkv_tile].head_dim, [&](auto head_dim) {
    return launch_bwd_dkv_tile<Element, head_dim()>(plan.dkv_tile, args, grid, stream);
  });
  return error != nullptr ? error : launch_dkv_sum<Element>(args, stream);
}

template <typename Element>
const char* launch_dq(const BwdPlan& plan, const AttentionBwdArgs& args, unsigned blocks, cudaStream_t stream) {
  return launch_choice<64, 96, 128, 192, 256>(kBwdDqTiles[plan.dq_tile].head_dim, [&](auto head_dim) {
    return launch_bwd_dq_tile<Element, head_dim()>(plan.dq_tile, args, blocks, stream);
  });
}

// dq, dk and dv by one kernel, and dq once more to round it.
template <typename Element>
const char* launch_hopper(const BwdPlan& plan, const AttentionBwdParams& p, const AttentionBwdArgs& bwd,
                          const BwdRowStatistics& rows, const BwdOrder& order, unsigned blocks, cudaStream_t stream) {
  AttentionBwdSm90Args args;
  args.bwd = bwd;
  args.dq.sum = rows.dq_sum, args.dq.turns = rows.turns;
  args.dq.padded_rows = bwd.padded_rows;
  args.dq.columns = rows.dq_columns, args.dq.dq_columns = plan.sm90_tile.head_dim;
  args.order = order;
  const char* error = nullptr;
  if (is_packed(p)) {
    error = launch_kernel(attention_bwd_order_kernel<QueryClass::kCount>, 1, QueryClass::kCount, 0, stream, order,
                          bwd.packed, bwd.scores.seqlen_q, bwd.scores.seqlen_k, plan.sm90_tile.block_k());
    if (error != nullptr) return error;
  }
  error = launch_choice<64, 96, 128, 192, 256>(plan.sm90_tile.head_dim, [&](auto head_dim) {
    return launch_bwd_sm90<Element, head_dim()>(plan.sm90_tile, args, p.batch, blocks, stream);
  });
  if (error == nullptr) error = launch_dkv_sum<Element>(bwd, stream);
  if (error != nullptr) return error;
  DqFinishArgs finish;
  finish.dq = args.dq;
  finish.out = p.dq;
  finish.packed_q = bwd.packed.q;
  finish.padded_rows = rows.padded_rows;
  finish.heads = bwd.heads, finish.seqlen_q = bwd.scores.seqlen_q, finish.head_dim = bwd.head_dim;
  finish.items = p.batch * p.heads * rows.padded_rows / 2 * (args.dq.dq_columns / 8);
  finish.scale = bwd.scale;
  finish.is_aligned = bwd.dq_is_aligned;
  return launch_kernel(attention_bwd_dq_finish_kernel<Element>,
                       static_cast<unsigned>(ceil_div(finish.items, kDqFinishThreads)), kDqFinishThreads, 0, stream,
                       finish);
}

template <typename Element>
const char* launch_dmask(const BwdPlan& plan, const AttentionBwdParams& p, const AttentionBwdArgs& bwd, float* partial,
                         cudaStream_t stream) {
  DmaskArgs args;
  args.bwd = bwd;
  args.places = plan.dmask_places, args.sharers = plan.dmask_sharers;
  args.splits = plan.dmask_splits;
  args.out = plan.dmask_splits > 1 ? partial : static_cast<float*>(p.dmask);
  args.elements = plan.dmask_elements;
  args.stride_batch = p.stride_dmask_batch, args.stride_head = p.stride_dmask_head;
  args.stride_q = p.stride_dmask_q, args.stride_k = p.stride_dmask_k;
  const dim3 grid(static_cast<unsigned>(plan.dmask_places.count()), static_cast<unsigned>(plan.dmask_splits));
  const char* error =
      launch_kernel(attention_bwd_dmask_kernel<Element>, grid, kDmaskThreads, kDmaskSmemBytes, stream, args);
  if (error != nullptr || plan.dmask_splits == 1) return error;
  const auto blocks = static_cast<unsigned>(ceil_div(plan.dmask_elements, kReduceSplitsThreads));
  return launch_kernel(reduce_splits_kernel<kReduceSplitsThreads>, blocks, kReduceSplitsThreads, 0, stream,
                       static_cast<float*>(p.dmask), static_cast<const float*>(partial), plan.dmask_elements,
                       plan.dmask_splits);
}

template <typename Element>
const char* launch_bwd(const BwdPlan& plan, const AttentionBwdParams& p, const DeviceLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  auto* workspace = static_cast<uint8_t*>(launch.workspace);
  const auto take = [&workspace](size_t bytes) {
    uint8_t* piece = workspace;
    workspace += bytes;
    return piece;
  };
  BwdRowStatistics rows;
  rows.lse_log2 = reinterpret_cast<float*>(take(plan.row_bytes()));
  rows.delta = reinterpret_cast<float*>(take(plan.row_bytes()));
  rows.padded_rows = plan.padded_rows, rows.packed_rows = plan.packed_rows;
  auto* dkv_states = reinterpret_cast<MaskTileState*>(take(aligned_bytes(plan.dkv_mask_tiles.bytes)));
  auto* dq_states = reinterpret_cast<MaskTileState*>(take(aligned_bytes(plan.dq_mask_tiles.bytes)));
  auto* dmask_partial = reinterpret_cast<float*>(take(plan.dmask_bytes()));
  BwdOrder order;
  if (plan.row_sum_parts > 0) {
    rows.row_sums = reinterpret_cast<float*>(take(plan.row_sum_parts * plan.row_bytes()));
    rows.row_sums_part = static_cast<int64_t>(plan.row_bytes() / 4), rows.row_sum_parts = plan.row_sum_parts;
  }
  if (plan.is_on_hopper()) {
    rows.dq_sum = reinterpret_cast<float*>(take(aligned_bytes(plan.dq_sum_bytes)));
    rows.dq_columns = plan.dq_sum_columns();
    if (plan.sm90_tile.sums_rows) {
      rows.row_sums = rows.dq_sum + plan.sm90_tile.head_dim * DqSum::kRows;
      rows.row_sums_part = DqSum::kRows, rows.row_sums_tile = rows.dq_columns * DqSum::kRows;
      rows.row_sum_parts = DqSum::kRowSumParts;
    }
    if (plan.turns_bytes > 0) rows.turns = reinterpret_cast<int*>(take(aligned_bytes(plan.turns_bytes)));
    if (plan.order_bytes > 0) {
      const int64_t bytes_per_head = 2 * (p.heads / p.heads_kv) * p.seqlen_q * (p.head_dim + p.head_dim_v);
      order = BwdOrder::in(take(aligned_bytes(plan.order_bytes)), p.batch,
                           kv_heads_per_section(p.heads_kv, bytes_per_head));
    }
  }

  AttentionBwdArgs args = make_args(plan, p, rows);
  args.parts = plan.parts;
  args.parts.first = reinterpret_cast<float*>(take(plan.parts_bytes()));
  const char* error = make_score_args(args.scores, p);
  const int64_t dkv_blocks = p.batch * p.heads_kv * args.key_tiles;
  const int64_t dq_blocks = p.batch * p.heads * args.query_tiles;
  // Of all grids that grow with the rows, this is the largest.
  const int64_t row_blocks = p.batch * p.heads * (plan.padded_rows / kRowsPerBlock);
  if (error == nullptr && (dkv_blocks * args.parts.count() > INT32_MAX || row_blocks > INT32_MAX)) {
    error = "batch * heads is too large";
  }
  if (error == nullptr && p.dmask != nullptr && plan.dmask_places.count() > INT32_MAX) error = "the mask is too large";

  if (error == nullptr) error = launch_rows<Element>(p, rows, stream);
  if (error == nullptr) error = launch_mask_tiles(plan.dkv_mask_tiles, args.scores, dkv_states, stream);
  args.mask_tiles = mask_tiles(plan.dkv_mask_tiles, p, dkv_states);
  if (plan.is_on_hopper()) {
    if (error == nullptr) {
      // Of packed sequences as many stay as run at once.
      const int64_t tiles = dkv_blocks * args.parts.count();
      const int64_t blocks = is_packed(p) ? min_of(tiles, launch.multiprocessors) : tiles;
      error = launch_hopper<Element>(plan, p, args, rows, order, static_cast<unsigned>(blocks), stream);
    }
  } else {
    if (error == nullptr) error = launch_dkv<Element>(plan, args, static_cast<unsigned>(dkv_blocks), stream);
    if (error == nullptr) error = launch_mask_tiles(plan.dq_mask_tiles, args.scores, dq_states, stream);
    args.mask_tiles = mask_tiles(plan.dq_mask_tiles, p, dq_states);
    if (error == nullptr) error = launch_dq<Element>(plan, args, static_cast<unsigned>(dq_blocks), stream);
  }
  if (error == nullptr) error = launch_row_gradients(p, rows, stream);
  if (error == nullptr && p.dmask != nullptr && !is_row_mask(p)) {
    error = launch_dmask<Element>(plan, p, args, dmask_partial, stream);
  }
  if (error == nullptr) error = clear_backward_gaps(p, stream);
  return error;
}

}  // namespace

size_t attention_bwd_cuda_workspace_bytes(const AttentionBwdParams& p, const DeviceLaunch& launch) {
  const BwdPlan plan = plan_bwd(p, launch);
  return plan.has_kernels() ? plan.workspace_bytes() : 0;
}

const char* attention_bwd_cuda(const AttentionBwdParams& p, const DeviceLaunch& launch) {
  const BwdPlan plan = plan_bwd(p, launch);
  if (!plan.has_kernels()) return "no tile of the backward fits head_dim and this card";
  return p.dtype == DType::kFloat16 ? launch_bwd<half_t>(plan, p, launch) : launch_bwd<bfloat16_t>(plan, p, launch);
}

}  // namespace fastattn
