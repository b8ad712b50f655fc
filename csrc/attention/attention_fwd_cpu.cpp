// Forward attention on the CPU:  out = softmax(scores) v,   lse = log-sum-exp of each row's scores.
// Work:    one task per (batch, head, range of rows); inside, blocks of kBlockRows rows visit the key tiles they see.
//          Of packed sequences the tasks with most work go first.
// Memory:  keys are packed (transposed) tile by tile when a thread first needs them and kept while it stays with the
//          same kv head; a block's queries, probabilities and unfinished output live in L1 and L2.
// Numbers: fp32 (fp64 for fp64 inputs) scores, softmax and accumulation; a row that sees nothing gives 0, and lse -inf.
//          The avx512_bf16 build multiplies bfloat16 q, k and v as they are, and p rounded to it.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1.
#include <limits>

#include "attention/attention.h"
#include "attention/attention_decode_cpu.h"
#include "attention/attention_finish_cpu.h"
#include "attention/attention_gemm_cpu.h"
#include "attention/attention_pack_cpu.h"
#include "attention/attention_packed_cpu.h"
#include "attention/attention_rows_cpu.h"
#include "attention/attention_scores_cpu.h"
#include "attention/attention_tile_cpu.h"
#include "common/parallel.h"
#include "common/read_ahead.h"
#include "common/scratch.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// 16 register tiles of 6 rows.
constexpr int kBlockRows = 96;
// The rows of a last, smaller register tile, which still keeps the multipliers busy.
constexpr int kFewRows = 4;
// Packed keys (and values) of one kv head stay in memory up to this size; beyond it each visit packs its tile again.
constexpr int64_t kPackedBytes = int64_t{4} << 20;
// Products, counting an element of keys and values, which is read and packed, as some. One thread does so many in 10 to
// 15 us; a second one would come 3 us late.
constexpr float kSerialProducts = 5e5f, kPackCost = 16;

// What one thread keeps between its tasks.
template <typename T, typename Operand>
struct Workspace {
  int64_t* kv_head;  // whose keys are packed, -1 = nobody's
  uint8_t* packed;   // a flag a tile slot
  Operand *k, *v, *q, *p;
  T *raw, *out, *row_max, *row_sum;
  ReadAhead ahead;  // what the next task reads

  FASTATTN_INLINE Workspace(ScratchCursor cursor, int64_t slots, int64_t depth, int64_t columns, bool packs_values) {
    take(cursor, slots, depth, columns, packs_values);
  }
  FASTATTN_INLINE static int64_t bytes(int64_t slots, int64_t depth, int64_t columns, bool packs_values) {
    Workspace none(ScratchCursor(nullptr), 0, 0, 0, false);
    return none.take(ScratchCursor(nullptr), slots, depth, columns, packs_values);
  }

 private:
  static constexpr int kTileTerms = kTileKeys / kTerms<Operand>;

  FASTATTN_INLINE int64_t take(ScratchCursor cursor, int64_t slots, int64_t depth, int64_t columns, bool packs_values) {
    kv_head = cursor.take<int64_t>(1);
    packed = cursor.take<uint8_t>(slots);
    k = cursor.take<Operand>(slots * depth * kTileKeys);
    v = cursor.take<Operand>(packs_values ? slots * columns * kTileTerms : 0);
    // pack_rows writes whole vectors, past the end of the last row.
    q = cursor.take<Operand>(kBlockRows * depth + Vec<Operand>::kLanes);
    p = cursor.take<Operand>(kBlockRows * kTileTerms);
    raw = kTerms<Operand> == 1 ? reinterpret_cast<T*>(p) : cursor.take<T>(kTileRows * kTileKeys);
    out = cursor.take<T>(kBlockRows * columns);
    row_max = cursor.take<T>(kBlockRows);
    row_sum = cursor.take<T>(kBlockRows * Vec<T>::kLanes);
    return cursor.bytes();
  }
};

// Operand: what q, k, v and p are multiplied as.
template <typename T, typename Element, typename Operand = T>
struct Forward {
  using V = Vec<T>;
  using Arrays = Workspace<T, Operand>;
  AttentionParams p;  // of the call, or of one of its sequences
  Dropout dropout;
  int64_t group, tiles, slots, most_slots, columns, tile_bytes, rows_per_task;
  int depth;
  bool packs_values;
  // Operands and results are more than the threads' L2 caches hold. What is there already costs more to ask for than
  // it gains.
  bool outgrows_l2;

  explicit Forward(const AttentionParams& params) : p(params) {
    dropout = make_dropout(p.dropout_p, p.rng_state);
    group = p.heads / p.heads_kv;
    depth = static_cast<int>(elements_for<Operand>(p.head_dim));
    columns = whole_vectors<T>(p.head_dim_v);
    // Values can be read in place if their rows are whole vectors of T and a tile of them lies together.
    packs_values = !std::is_same_v<Operand, Element> || columns != p.head_dim_v || p.v.stride_row != columns ||
                   (p.cache.table != nullptr && p.cache.block_size % kTileKeys != 0);
    const int64_t tile_elements = (depth + (packs_values ? columns / kTerms<Operand> : 0)) * kTileKeys;
    tile_bytes = tile_elements * static_cast<int64_t>(sizeof(Operand));
    plan_keys();
    // A sequence shorter than the longest may keep its tiles where the longest cannot.
    most_slots =
        is_packed(p) || is_cached(p) ? max_of<int64_t>(slots, min_of(tiles, kPackedBytes / tile_bytes)) : slots;
    plan_tasks();
    const int64_t query_elements = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v);
    const int64_t key_elements = p.batch * p.heads_kv * p.seqlen_k * (p.head_dim + p.head_dim_v);
    const int64_t bytes = (query_elements + key_elements) * static_cast<int64_t>(sizeof(Element));
    outgrows_l2 = bytes > max_threads() * (int64_t{1} << 20);
  }

  void plan_keys() {
    tiles = (p.seqlen_k + kTileKeys - 1) / kTileKeys;
    slots = tiles * tile_bytes <= kPackedBytes ? tiles : 1;
  }

  // Whole heads where that keeps all threads busy: each of a head's tasks may have to pack its keys once more.
  void plan_tasks() {
    // Of packed sequences, as many as there were if all had the greatest length.
    const int64_t entries = is_packed(p) ? (p.packed_q.total + p.seqlen_q - 1) / p.seqlen_q : p.batch;
    const int64_t heads = entries * p.heads, threads = max_threads();
    const int64_t blocks = (p.seqlen_q + kBlockRows - 1) / kBlockRows;
    const bool heads_balance = heads % threads == 0 || heads >= 8 * threads;
    const int64_t wanted = heads_balance ? 1 : (8 * threads + heads - 1) / heads;
    constexpr int64_t kMostBlocks = 6;
    int64_t blocks_per_task = max_of<int64_t>(1, min_of<int64_t>(kMostBlocks, blocks / wanted));
    rows_per_task = blocks_per_task * kBlockRows;
  }
  int64_t tasks_per_head() const { return (p.seqlen_q + rows_per_task - 1) / rows_per_task; }

  // The kernel of one batch entry.
  Forward entry(int64_t batch) const {
    Forward one = *this;
    narrow_to_entry(one.p, batch);
    one.plan_keys();
    return one;
  }

  void run() {
    const bool alone = is_little_work();
    const int threads = alone ? 1 : max_threads();
    const Scratch scratch(threads, Arrays::bytes(most_slots, depth, columns, packs_values));
    for (int thread = 0; thread < threads; ++thread) *workspace(scratch, thread).kv_head = -1;
    const EntryTasks tasks(p, [&](int64_t batch) { return p.heads * entry(batch).tasks_per_head(); });
    const auto run_numbered = [&](int64_t number, int thread) {
      const EntryTask task = tasks.at(number);
      Arrays arrays = workspace(scratch, thread);
      // Tasks are handed out in turn: of equal ones, the one after the other threads' is this thread's next.
      if (number + threads < tasks.count()) {
        const EntryTask next = tasks.at(number + threads);
        entry(next.batch).read_ahead(arrays.ahead, task, next);
      }
      entry(task.batch).run_task(arrays, task);
    };
    if (alone) {
      for (int64_t number = 0; number < tasks.count(); ++number) run_numbered(number, 0);
    } else {
      parallel_tasks(tasks.count(), run_numbered);
    }
    if (is_packed(p)) finish_gaps<T>(p);
  }

  // Whether waking other threads and handing them tasks takes longer than they save. In floats: no shape overflows.
  bool is_little_work() const {
    if (is_packed(p) || is_cached(p)) return false;
    const float keys =
        static_cast<float>(p.batch) * static_cast<float>(p.seqlen_k) * static_cast<float>(p.head_dim + p.head_dim_v);
    const float products = keys * static_cast<float>(p.heads) * static_cast<float>(p.seqlen_q);
    return products + kPackCost * keys * static_cast<float>(p.heads_kv) < kSerialProducts;
  }

  void run_task(Arrays& w, EntryTask task) { run_rows(w, task.batch, head_of_task(task), rows_of_task(task)); }

  int64_t head_of_task(EntryTask task) const { return task.index / tasks_per_head(); }
  IndexRange rows_of_task(EntryTask task) const {
    const int64_t ranges = tasks_per_head();
    // The last rows see most under a causal mask, so they go first.
    const int64_t range = ranges - 1 - task.index % ranges;
    return {range * rows_per_task, min_of(p.seqlen_q, (range + 1) * rows_per_task)};
  }

  // Lists what task `next` will read, first what it needs first, to be read during task `now`.
  void read_ahead(ReadAhead& ahead, EntryTask now, EntryTask next) const {
    if (is_cached(p) || !outgrows_l2) return;
    const int64_t head = head_of_task(next), head_kv = head / group, bytes = sizeof(Element);
    const IndexRange rows = rows_of_task(next);
    const auto add = [&](const AttentionTensor& tensor, int64_t at, IndexRange range, int64_t width) {
      ahead.add(head_of<const Element>(tensor, next.batch, at) + range.begin * tensor.stride_row,
                range.end - range.begin, width * bytes, tensor.stride_row * bytes);
    };
    add(p.q, head, rows, p.head_dim);
    if (next.batch != now.batch || head_kv != head_of_task(now) / group) {
      add(p.k, head_kv, {0, p.seqlen_k}, p.head_dim);
      add(p.v, head_kv, {0, p.seqlen_k}, p.head_dim_v);
    }
    // A quarter of the tiles may be hidden.
    ahead.spread((rows.end - rows.begin) / kTileRows * tiles * 2 * 3 / 4);
  }

  FASTATTN_INLINE Arrays workspace(const Scratch& scratch, int thread) const {
    return Arrays(ScratchCursor(scratch.piece(thread)), most_slots, depth, columns, packs_values);
  }

  void run_rows(Arrays& w, int64_t batch, int64_t head, IndexRange range) {
    const int64_t kv_head = batch * p.heads_kv + head / group;
    if (*w.kv_head != kv_head) {
      *w.kv_head = kv_head;
      for (int64_t slot = 0; slot < slots; ++slot) w.packed[slot] = 0;
    }
    const HeadScores<T> scores = make_head_scores<T>(p, batch, head);
    // Blocks of equal height, so that none is left with a few rows.
    const int64_t blocks = (range.end - range.begin + kBlockRows - 1) / kBlockRows;
    const int64_t height = padded_rows((range.end - range.begin + blocks - 1) / blocks);
    for (int64_t row = range.begin; row < range.end; row += height) {
      run_block(w, scores, batch, head, {row, min_of(row + height, range.end)});
    }
  }

  void run_block(Arrays& w, const HeadScores<T>& scores, int64_t batch, int64_t head, IndexRange range) {
    const int rows = static_cast<int>(range.end - range.begin);
    const Element* q = head_of<const Element>(p.q, batch, head) + range.begin * p.q.stride_row;
    // The last register tile may compute rows that do not exist.
    const int padded = static_cast<int>(padded_rows(rows));
    const Rows<const Operand> queries = prepare_queries(w, q, rows, padded);

    const CachedRows<Element> k(p, p.k, batch, head / group), v(p, p.v, batch, head / group);
    const IndexRange seen = scores.band.keys_seen_by_any(range);
    bool first = true;
    for (int64_t tile = seen.begin / kTileKeys; tile * kTileKeys < seen.end; ++tile) {
      uint64_t visible[kBlockRows];
      const TileView view = scores.view(range, tile * kTileKeys, visible);
      if (view == TileView::kHidden) continue;
      for (int row = rows; row < padded && view == TileView::kPartial; ++row) visible[row] = visible[rows - 1];
      const Operand* tile_v = prepare_tile(w, k, v, tile, scores.dot_factor);
      const Operand* tile_k = w.k + (slots == 1 ? 0 : tile) * depth * kTileKeys;
      RowBlock<T, Operand> block = {&scores,
                                    &dropout,
                                    static_cast<uint32_t>(batch * p.heads + head),
                                    depth,
                                    depth_step_of(depth, p.seqlen_q, p.seqlen_k),
                                    range.begin,
                                    queries.data,
                                    queries.stride,
                                    w.p,
                                    w.raw,
                                    w.row_max,
                                    w.row_sum,
                                    w.out,
                                    columns};
      visit_tile(
          block, padded,
          {tile_k, tile * kTileKeys, 0, kTileKeys / V::kLanes, view == TileView::kPartial ? visible : nullptr, first},
          tile_v, w.ahead);
      first = false;
    }
    finish_rows(w, batch, head, range, !first);
  }

  // The rows at q: where they lie, if those are all that the register tiles read and of the type that is multiplied.
  FASTATTN_INLINE Rows<const Operand> prepare_queries(Arrays& w, const Element* q, int rows, int padded) const {
    if constexpr (std::is_same_v<Operand, Element>) {
      if (rows == padded) return {q, p.q.stride_row};
    }
    pack_left(w.q, depth, q, p.q.stride_row, rows, static_cast<int>(p.head_dim));
    for (int64_t i = int64_t{rows} * depth; i < int64_t{padded} * depth; ++i) w.q[i] = {};
    return {w.q, depth};
  }

  // Packs the tile unless that was done; returns its values, row after row of `columns`.
  FASTATTN_INLINE const Operand* prepare_tile(Arrays& w, const CachedRows<Element>& k, const CachedRows<Element>& v,
                                              int64_t tile, T dot_factor) {
    const int64_t slot = slots == 1 ? 0 : tile, key0 = tile * kTileKeys;
    const int keys = static_cast<int>(min_of<int64_t>(kTileKeys, p.seqlen_k - key0));
    Operand* packed_v = packs_values ? w.v + slot * columns * kTileKeys / kTerms<Operand> : nullptr;
    if (slots != tiles || !w.packed[slot]) {
      w.packed[slot] = 1;
      k.with_tile(key0, keys, [&](const auto& rows) __attribute__((always_inline)) {
        Operand* packed_k = w.k + slot * depth * kTileKeys;
        if constexpr (kTerms<Operand> == 1) {
          pack_keys(packed_k, rows, keys, depth, dot_factor);
        } else {
          pack_keys(packed_k, rows, keys, static_cast<int>(p.head_dim));
        }
      });
      if (packs_values) {
        v.with_tile(key0, keys, [&](const auto& rows) __attribute__((always_inline)) {
          pack_right(packed_v, columns, rows, keys, static_cast<int>(p.head_dim_v));
        });
      }
    }
    if constexpr (std::is_same_v<Operand, Element>) {
      if (!packs_values) return v.row(key0);
    }
    return packed_v;
  }

  // Rows are computed kTileRows at a time, the last ones by four where that is enough.
  static FASTATTN_INLINE int64_t padded_rows(int64_t rows) {
    const int64_t whole = rows / kTileRows * kTileRows, rest = rows - whole;
    return whole + (rest == 0 ? 0 : rest <= kFewRows ? kFewRows : kTileRows);
  }

  // All rows against one tile: first every row's probabilities, while the tile's keys are in L1, then its values.
  FASTATTN_INLINE void visit_tile(const RowBlock<T, Operand>& block, int rows, const KeyTile<Operand>& tile,
                                  const Operand* v, ReadAhead& ahead) {
    const int keys = static_cast<int>(min_of<int64_t>(kTileKeys, p.seqlen_k - tile.key0));
    IndexRange seen[kBlockRows / kTileRows];
    for (int row = 0; row < rows; row += kTileRows) {
      IndexRange& range = seen[row / kTileRows] = {0, keys};
      if (tile.visible) {
        uint64_t any_row = 0;
        for (int r = 0; r < min_of(kTileRows, rows - row); ++r) any_row |= tile.visible[row + r];
        // On the first tile the statistics still have to be set.
        range = any_row != 0 ? IndexRange{__builtin_ctzll(any_row), 64 - __builtin_clzll(any_row)}
                             : IndexRange{0, tile.first ? 1 : 0};
        if (range.end == 0) continue;
      }
      ahead.step();
      if (rows - row >= kTileRows) {
        score_rows<kTileRows>(rows_from(block, row), tile, row, range);
      } else {
        score_rows<kFewRows>(rows_from(block, row), tile, row, range);
      }
    }
    for (int row = 0; row < rows; row += kTileRows) {
      const IndexRange range = seen[row / kTileRows];
      if (range.end == 0) continue;
      ahead.step();
      const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
      if (rows - row >= kTileRows) {
        accumulate_values<kTileRows>(rows_from(block, row), v, columns, begin, end, tile.first);
      } else {
        accumulate_values<kFewRows>(rows_from(block, row), v, columns, begin, end, tile.first);
      }
    }
  }

  static FASTATTN_INLINE RowBlock<T, Operand> rows_from(RowBlock<T, Operand> block, int row) {
    block.row0 += row;
    block.q += row * block.stride_q;
    block.p += row * kTileKeys / kTerms<Operand>;
    if constexpr (kTerms<Operand> == 1) block.raw = block.p;
    block.row_max += row;
    block.row_sum += row * V::kLanes;
    block.out += row * block.ld_out;
    return block;
  }

  template <int kRows>
  static FASTATTN_INLINE void score_rows(const RowBlock<T, Operand>& rows, KeyTile<Operand> tile, int row,
                                         IndexRange seen) {
    if (rows.scores->has_terms() || rows.dropout->active()) return score_rows<kRows, false>(rows, tile, row, seen);
    score_rows<kRows, true>(rows, tile, row, seen);
  }

  template <int kRows, bool kPlain>
  static FASTATTN_INLINE void score_rows(const RowBlock<T, Operand>& rows, KeyTile<Operand> tile, int row,
                                         IndexRange seen) {
    constexpr int kAllVecs = kTileKeys / V::kLanes;
    if (tile.visible == nullptr) return score_tile<kRows, kAllVecs, false, kPlain>(rows, tile);
    tile.visible += row;
    if constexpr (kAllVecs == kTileVecs) {
      // Vectors of keys that no row of the register tile sees are left out.
      tile.vec_begin = static_cast<int>(seen.begin) / V::kLanes;
      tile.vec_end = (static_cast<int>(seen.end) + V::kLanes - 1) / V::kLanes;
      switch (tile.vec_end - tile.vec_begin) {
        case 1:
          return score_tile<kRows, 1, true, kPlain>(rows, tile);
        case 2:
          return score_tile<kRows, 2, true, kPlain>(rows, tile);
        case 3:
          return score_tile<kRows, 3, true, kPlain>(rows, tile);
      }
    }
    score_tile<kRows, kAllVecs, true, kPlain>(rows, tile);
  }

  void finish_rows(Arrays& w, int64_t batch, int64_t head, IndexRange range, bool visited) {
    for (int64_t row = range.begin; row < range.end; row += V::kLanes) {
      const int64_t first = row - range.begin;
      const int count = static_cast<int>(min_of<int64_t>(V::kLanes, range.end - row));
      if (visited &&
          finish_usual_rows<T, Element>(p, batch, head, row, count, w.row_max + first, w.row_sum + first * V::kLanes,
                                        dropout.keep_scale, w.out + first * columns, columns)) {
        continue;
      }
      for (int64_t r = first; r < first + count; ++r) {
        RowStatistics statistics;
        if (visited) statistics = {w.row_max[r], V::load(w.row_sum + r * V::kLanes).reduce_add()};
        finish_row<T, Element>(p, batch, head, range.begin + r, statistics, dropout.keep_scale, w.out + r * columns);
      }
    }
  }
};

}  // namespace

#if defined(__AVX512BF16__)

void attention_fwd_cpu(const AttentionParams& p) {
  if (p.dtype != DType::kBFloat16 || decode_suits(p)) return isa_avx512::attention_fwd_cpu(p);
  if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0) return;
  Forward<float, BFloat16, BFloat16Pair>(p).run();
}

#else

void attention_fwd_cpu(const AttentionParams& p) {
  if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0) return;
  if (decode_suits(p)) return attention_decode_cpu(p);
  switch (p.dtype) {
    case DType::kFloat64:
      return Forward<double, double>(p).run();
    case DType::kBFloat16:
      return Forward<float, BFloat16>(p).run();
    case DType::kFloat16:
      return Forward<float, Float16>(p).run();
    default:
      return Forward<float, float>(p).run();
  }
}

#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
