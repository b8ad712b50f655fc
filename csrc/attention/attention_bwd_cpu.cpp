// Backward attention on the CPU. p is recomputed from lse; README.md derives the formulas.
//   dv = p^T dout,  dp = dout v^T,  ds = p * (dp - delta + dlse),  dq = scale * ds k,  dk = scale * ds^T q
// Delta:   of few keys (sees_all_keys in the plan) from p and dp at hand, sum(p * dp), and p is divided by its own sum;
//          of more keys dout . out, which is the same but for its rounding and known before the first tile.
// Work:    a task is one (batch, kv head) with its group of query heads; where there are too few of those for the
//          threads, one block of keys of it, or, of few keys, one block of rows. Keys are the outer loop, so dk and dv
//          are complete when a block of keys is. Of packed sequences the tasks with most work go first.
// Memory:  a block of keys with its transposed copies stays in L2 while the rows of the heads stream past it; tiles of
//          p and ds stay in L1. Operands that are not rows of T without gaps are copied and padded.
// Numbers: fp32 (fp64 for fp64 inputs) throughout; a row that sees nothing gets gradients of 0. The avx512_bf16 build
//          multiplies bfloat16 as it is, and p and ds rounded to it.
// Order:   dq adds blocks of keys in rising order, dk and dv heads and rows in rising order, whatever the threads do.
// Files:   attention_bwd_{plan,memory,turns}_cpu.h divide the work, hold the arrays and order the additions,
//          attention_bwd_{query,key}_cpu.h bring operands in and results out, attention_bwd_{tile,rows,mask,sink}_cpu.h
//          are the arithmetic.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
#include "attention/attention.h"
#include "attention/attention_bwd_key_cpu.h"
#include "attention/attention_bwd_mask_cpu.h"
#include "attention/attention_bwd_memory_cpu.h"
#include "attention/attention_bwd_plan_cpu.h"
#include "attention/attention_bwd_query_cpu.h"
#include "attention/attention_bwd_rows_cpu.h"
#include "attention/attention_bwd_sink_cpu.h"
#include "attention/attention_bwd_tile_cpu.h"
#include "attention/attention_bwd_turns_cpu.h"
#include "attention/attention_packed_cpu.h"
#include "common/dropout_cpu.h"
#include "common/parallel.h"
#include "common/read_ahead.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// What the tasks of a call share.
template <typename T, typename Element, typename Operand>
struct BackwardCall {
  const BackwardPlan<T, Element, Operand>& plan;
  SharedArrays<T, Operand> shared;
  MaskGradient<T> mask;
  SinkGradient<T> sink;
  Dropout dropout;
};

// A block of rows of one head, and the block of keys that it meets.
template <typename T, typename Operand>
struct RowsAndKeys {
  const QuerySide<T, Operand>* head;
  int64_t head_index, query_block, row0;
  int rows;
  int64_t key_begin, key_end;
  // No rows have added to the dk and dv of these keys yet; no keys will add to the dq of these rows any more.
  bool are_first_rows, are_last_keys;
  HeadScores<T> scores;
};

// What a block of rows does with a tile of keys.
template <typename T, typename Operand>
struct PlacedTile {
  BackwardTile<T, Operand> tile;
  TileLimits limits;
  uint64_t visible[kTileQueries], kept[kTileQueries];
  bool hidden;
};

// One batch entry. Operand: what the five products multiply.
template <typename T, typename Element, typename Operand>
class EntryBackward {
  using Plan = BackwardPlan<T, Element, Operand>;
  using Call = BackwardCall<T, Element, Operand>;
  using Arrays = ThreadArrays<T, Operand>;
  using Head = QuerySide<T, Operand>;
  using Keys = KeySide<T, Operand>;
  using Block = RowsAndKeys<T, Operand>;
  using Placed = PlacedTile<T, Operand>;

 public:
  EntryBackward(const Call& call, int64_t batch) : call_(call), batch_(batch), plan_(call.plan.entry(batch)) {}
  EntryBackward(const EntryBackward&) = delete;
  EntryBackward& operator=(const EntryBackward&) = delete;

  // A block of rows of heads that threads share.
  void prepare_shared_rows(int64_t head_index, int64_t block) const {
    if (block >= plan_.query_blocks) return;
    const Head& head = call_.shared.heads[batch_ * p_.heads + head_index];
    QueryRows(plan_).prepare_rows(head, call_.sink, call_.mask, batch_, head_index, block);
  }

  // Lists what the task will read, first what it needs first.
  void read_ahead(ReadAhead& ahead, int64_t task) const {
    if (plan_.splits) return;
    const auto add = [&](const AttentionTensor& tensor, int64_t head, int64_t rows, int64_t columns) {
      const int64_t bytes = sizeof(Element);
      ahead.add(row_of<Element>(tensor, batch_, head, 0), rows, columns * bytes, tensor.stride_row * bytes);
    };
    const int64_t first_head = task * plan_.group;
    if (!plan_.sees_all_keys) add(p_.out, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.dout, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.k, task, p_.seqlen_k, p_.head_dim);
    add(p_.v, task, p_.seqlen_k, p_.head_dim_v);
    add(p_.q, first_head, p_.seqlen_q, p_.head_dim);
    // Five products a tile. A quarter of the tiles may be hidden.
    const int64_t tiles = plan_.query_blocks * plan_.tiles();
    ahead.spread(tiles * 5 * (kTileQueries / kTileRows) * 3 / 4);
  }

  void run_task(const Arrays& arrays, int64_t task) const {
    const int64_t head_kv = task / plan_.tasks_a_pair(), part = task % plan_.tasks_a_pair();
    const int64_t row_blocks = plan_.row_blocks();
    if (plan_.splits) {
      const Head* heads = call_.shared.heads + batch_ * p_.heads + head_kv * plan_.group;
      if (!plan_.sees_all_keys) return run_block(arrays, heads, head_kv, part, {0, row_blocks});
      return run_block(arrays, heads, head_kv, 0, {part, min_of(part + 1, row_blocks)});
    }
    const QueryRows query(plan_);
    for (int64_t g = 0; g < plan_.group; ++g) {
      const int64_t head_index = head_kv * plan_.group + g;
      query.point_at_tensors(arrays.heads[g], batch_, head_index);
      for (int64_t block = 0; block < plan_.query_blocks; ++block) {
        query.prepare_rows(arrays.heads[g], call_.sink, call_.mask, batch_, head_index, block);
      }
    }
    for (int64_t block = 0; block < plan_.key_blocks; ++block) {
      run_block(arrays, arrays.heads, head_kv, block, {0, row_blocks});
    }
  }

 private:
  // Blocks of rows of the group's heads, counted head by head, against one block of keys.
  void run_block(const Arrays& arrays, const Head* heads, int64_t head_kv, int64_t block, IndexRange row_range) const {
    const int64_t key0 = block * plan_.block_tiles * kTileKeys;
    const int keys = static_cast<int>(min_of<int64_t>(plan_.block_tiles * kTileKeys, p_.seqlen_k - key0));
    const KeyRows key_rows(plan_);
    const bool shares_keys = plan_.splits && plan_.sees_all_keys;
    const KeyGradients<T>* shared = shares_keys ? call_.shared.keys + batch_ * p_.heads_kv + head_kv : nullptr;
    const Keys first = key_rows.prepare(arrays, shared, batch_, head_kv, key0, keys);
    if (plan_.row_blocks() == 0) key_rows.clear(first, keys);
    for (int64_t rows = row_range.begin; rows < row_range.end; ++rows) {
      run_rows(arrays.tile, heads[rows / plan_.query_blocks], first, head_kv, block, rows);
    }
    if (row_range.end == plan_.row_blocks()) key_rows.store(first, batch_, head_kv, key0, keys);
  }

  // One block of rows against one block of keys: tile by tile, or all tiles at once where a row's p and dp are to be at
  // hand. `rows` counts the group's blocks of rows.
  void run_rows(const TileBuffers<T, Operand>& buffers, const Head& head, const Keys& first, int64_t head_kv,
                int64_t block, int64_t rows) const {
    const QueryRows query(plan_);
    const Block at = locate(head, head_kv, block, rows);
    const BackwardTurns turns(plan_, call_.shared, call_.mask, batch_, head_kv, block, rows);
    Placed placed[kMostTilesAtHand];
    T weight[kTileQueries], delta[kTileQueries];
    RowTerms<T> terms{head.delta + at.row0, head.dlse + at.row0, nullptr};
    const int tiles = static_cast<int>((at.key_end - at.key_begin + kTileKeys - 1) / kTileKeys);
    if (tiles == 0) query.clear(head, at.row0, at.rows);
    const int at_once = plan_.sees_all_keys ? max_of(tiles, 1) : 1;
    for (int tile0 = 0; tile0 < max_of(tiles, 1); tile0 += at_once) {
      const int count = min_of(at_once, tiles - tile0);
      for (int t = 0; t < count; ++t) {
        placed[t].tile.keys = KeyRows(plan_).tile_at(first, (tile0 + t) * kTileKeys);
        placed[t].tile.buffers = buffers_at(buffers, t);
        start_tile(placed[t], at, at.key_begin + (tile0 + t) * kTileKeys);
      }
      if (plan_.sees_all_keys) {
        sum_all_keys(weight, delta, placed, count, at);
        terms = {delta, head.dlse + at.row0, weight};
      }
      for (int t = 0; t < count; ++t) finish_tile(placed[t], tile0 + t, at, terms, turns);
    }
    turns.wait_mask();
    turns.done_mask();
    turns.wait_dq();
    if (at.are_last_keys) query.store(head, batch_, at.head_index, at.row0, at.rows);
    turns.done_dq();
  }

  Block locate(const Head& head, int64_t head_kv, int64_t block, int64_t rows) const {
    Block at;
    at.head = &head;
    at.head_index = head_kv * plan_.group + rows / plan_.query_blocks;
    at.query_block = rows % plan_.query_blocks;
    at.row0 = at.query_block * kTileQueries;
    at.rows = static_cast<int>(min_of<int64_t>(kTileQueries, p_.seqlen_q - at.row0));
    at.key_begin = block * plan_.block_tiles * kTileKeys;
    at.key_end = min_of(at.key_begin + plan_.block_tiles * kTileKeys, p_.seqlen_k);
    at.are_first_rows = rows == 0;
    at.are_last_keys = block == plan_.key_blocks - 1;
    at.scores = make_head_scores<T>(p_, batch_, at.head_index);
    return at;
  }

  // p and dp of a tile, in its buffers. What the tile does not overwrite of gradients that nobody wrote before is 0.
  void start_tile(Placed& placed, const Block& at, int64_t key0) const {
    place_tile(placed, at, key0);
    TilePlace& place = placed.tile.place;
    const bool is_whole = !placed.hidden && place.visible == nullptr;
    const bool starts_dq = key0 == 0, starts_dkv = at.are_first_rows;
    if (starts_dq && !is_whole) QueryRows(plan_).clear(*at.head, at.row0, at.rows);
    // Nobody else touches them before the turn of these rows is over.
    if (starts_dkv && !is_whole) KeyRows(plan_).clear(placed.tile.keys, place.keys);
    place.starts_dq = starts_dq && is_whole, place.starts_dkv = starts_dkv && is_whole;
    if (placed.hidden) return;
    placed.limits = placed.tile.limits();
    call_.mask.prefetch(batch_, at.head_index, place);
    probabilities_and_gradients(placed.tile, placed.limits);
  }

  // Which keys from key0 on the rows see, and which of them dropout keeps.
  void place_tile(Placed& placed, const Block& at, int64_t key0) const {
    TilePlace& place = placed.tile.place;
    place = {at.row0, key0,    at.rows, static_cast<int>(min_of<int64_t>(kTileKeys, at.key_end - key0)),
             nullptr, nullptr, false,   false};
    const TileView view = at.scores.view({at.row0, at.row0 + at.rows}, key0, placed.visible);
    placed.hidden = view == TileView::kHidden;
    if (placed.hidden) return;
    if (view == TileView::kPartial) place.visible = placed.visible;
    if (call_.dropout.active()) {
      const uint32_t batch_head = static_cast<uint32_t>(batch_ * p_.heads + at.head_index);
      for (int r = 0; r < at.rows; ++r) {
        placed.kept[r] = call_.dropout.kept_columns(batch_head, static_cast<uint32_t>(at.row0 + r), key0);
      }
      place.kept = placed.kept;
    }
    placed.tile.params = &p_;
    placed.tile.scores = &at.scores;
    placed.tile.head = at.head;
    placed.tile.keep_scale = static_cast<T>(call_.dropout.keep_scale);
  }

  // The terms of rows whose probabilities are all at hand, and what sinks and a mask that broadcasts over keys get.
  void sum_all_keys(T* weight, T* delta, const Placed* placed, int count, const Block& at) const {
    ProbabilityTile<T> tiles[kMostTilesAtHand];
    int seen = 0;
    for (int t = 0; t < count; ++t) {
      const BackwardTile<T, Operand>& tile = placed[t].tile;
      if (!placed[t].hidden) tiles[seen++] = {tile.place, tile.buffers.p, tile.buffers.ds};
    }
    sum_rows(weight, delta, tiles, seen, at.rows, static_cast<T>(call_.dropout.keep_scale));
    double dsink = 0;
    for (int r = 0; r < at.rows; ++r) {
      const T lse = at.head->lse[at.row0 + r], dlse = at.head->dlse[at.row0 + r];
      const double sink = call_.sink.probability(at.head_index, lse), sum = weight[r] + sink;
      const double scale = sum > 0 ? 1 / sum : 0, row_delta = delta[r] * scale;
      call_.mask.set_row(batch_, at.head_index, at.row0 + r, weight[r] * scale * dlse + sink * scale * row_delta);
      weight[r] = static_cast<T>(scale);
      delta[r] = static_cast<T>(row_delta);
      dsink += sink * scale * (dlse - row_delta);
    }
    call_.sink.set(batch_, at.head_index, at.query_block, dsink);
  }

  // Adds what start_tile left to dv, dk, dq and the mask's gradient, each when it is these rows' turn.
  void finish_tile(const Placed& placed, int number, const Block& at, const RowTerms<T>& terms,
                   const BackwardTurns& turns) const {
    const MaskGradient<T>& mask = call_.mask;
    const auto add_to_mask = [&](const T* ds) {
      turns.wait_mask();
      if (mask.kind() == MaskGradientKind::kPerKey) turns.wait_dkv(number);
      mask.add_tile(ds, batch_, at.head_index, placed.tile.place);
    };
    if (!placed.hidden) {
      add_gradients(
          placed.tile, placed.limits, terms, mask.takes_tiles(), add_to_mask, [&] { turns.wait_dkv(number); },
          [&] { turns.wait_dq(); });
    } else if (mask.kind() == MaskGradientKind::kFull) {
      add_to_mask(nullptr);
    }
    turns.wait_dkv(number);
    turns.done_dkv(number);
  }

  static TileBuffers<T, Operand> buffers_at(const TileBuffers<T, Operand>& first, int tile) {
    const int64_t at = tile * kTileElements;
    return {first.p + at, first.ds + at, first.slope ? first.slope + at : nullptr, first.left, first.ahead};
  }

  const Call& call_;
  const int64_t batch_;
  const Plan plan_;
  const AttentionBwdParams& p_ = plan_.p;
};

// Threads that share heads also share their query sides, which are prepared before the tasks start.
template <typename T, typename Element, typename Operand>
void prepare_shared_heads(const BackwardCall<T, Element, Operand>& call) {
  const AttentionBwdParams& p = call.plan.p;
  const int64_t heads = p.batch * p.heads, blocks = call.plan.most_query_blocks;
  for (int64_t i = 0; i < heads; ++i) {
    const BackwardPlan<T, Element, Operand> entry = call.plan.entry(i / p.heads);
    QueryRows(entry).point_at_tensors(call.shared.heads[i], i / p.heads, i % p.heads);
  }
  parallel_tasks(heads * blocks, [&](int64_t task, int) {
    const int64_t head = task / blocks, block = task % blocks;
    EntryBackward(call, head / p.heads).prepare_shared_rows(head % p.heads, block);
  });
}

template <typename T, typename Element, typename Operand>
void run_tasks(const BackwardCall<T, Element, Operand>& call) {
  const BackwardPlan<T, Element, Operand>& plan = call.plan;
  ScratchCursor size(nullptr);
  take_thread(size, plan);
  Scratch memory(plan.threads, size.bytes());
  const EntryTasks tasks(plan.p, [&](int64_t batch) { return plan.p.heads_kv * plan.entry(batch).tasks_a_pair(); });
  parallel_tasks(tasks.count(), [&](int64_t number, int thread) {
    ScratchCursor cursor(memory.piece(thread));
    ThreadArrays<T, Operand> arrays = take_thread(cursor, plan);
    // Tasks are handed out in turn: of equal ones, the one after the other threads' is this thread's next.
    ReadAhead ahead;
    if (number + plan.threads < tasks.count()) {
      const EntryTask next = tasks.at(number + plan.threads);
      EntryBackward(call, next.batch).read_ahead(ahead, next.index);
    }
    arrays.tile.ahead = &ahead;
    const EntryTask task = tasks.at(number);
    EntryBackward(call, task.batch).run_task(arrays, task.index);
  });
}

template <typename T, typename Element, typename Operand = T>
void run_backward(const AttentionBwdParams& p) {
  const BackwardPlan<T, Element, Operand> plan(p);
  ScratchCursor size(nullptr);
  take_shared(size, plan);
  Scratch memory(1, size.bytes());
  ScratchCursor cursor(memory.piece(0));
  const SharedArrays<T, Operand> shared = take_shared(cursor, plan);
  const BackwardCall<T, Element, Operand> call{plan, shared, MaskGradient<T>(p, shared.mask_partials),
                                               SinkGradient<T>(p, shared.sink_partials, plan.most_query_blocks),
                                               make_dropout(p.dropout_p, p.rng_state)};
  if (plan.splits) prepare_shared_heads(call);
  run_tasks(call);
  call.mask.reduce();
  call.sink.reduce();
  if (!is_packed(p)) return;
  // Gradients of rows and keys that no sequence has are 0.
  clear_gaps(p.dq, p.dtype, p.heads, p.head_dim, p.packed_q, p.batch, p.seqlen_q);
  clear_gaps(p.dk, p.dtype, p.heads_kv, p.head_dim, p.packed_k, p.batch, p.seqlen_k);
  clear_gaps(p.dv, p.dtype, p.heads_kv, p.head_dim_v, p.packed_k, p.batch, p.seqlen_k);
}

}  // namespace

#if defined(__AVX512BF16__)

void attention_bwd_cpu(const AttentionBwdParams& p) {
  if (p.dtype != DType::kBFloat16) return isa_avx512::attention_bwd_cpu(p);
  run_backward<float, BFloat16, BFloat16Pair>(p);
}

#else

void attention_bwd_cpu(const AttentionBwdParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return run_backward<float, BFloat16>(p);
    case DType::kFloat16:
      return run_backward<float, Float16>(p);
    case DType::kFloat64:
      return run_backward<double, double>(p);
    default:
      return run_backward<float, float>(p);
  }
}

#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
