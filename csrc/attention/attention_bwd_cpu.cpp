// Backward attention on the CPU. p is recomputed from lse; README.md derives the formulas.
//   dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale * ds k,  dk = scale * ds^T q,  delta = sum(dout * out) -
//   dlse
// Work:    a task is one (batch, kv head) with its group of query heads; where there are too few of those for the
// threads,
//          one block of keys of it. Keys are the outer loop, so dk and dv are complete when a block of keys is.
//          Of packed sequences the tasks with most work go first.
// Memory:  a block of keys with its transposed copies stays in L2 while the rows of the heads stream past it; the tiles
// of
//          p and ds stay in L1. Operands that are not rows of T without gaps are copied and padded.
// Numbers: fp32 (fp64 for fp64 inputs) throughout; a row that sees nothing gets gradients of 0. The avx512_bf16 build
//          multiplies bfloat16 as it is, and p and ds rounded to it.
// Order:   dq adds blocks of keys in rising order, dk and dv heads and rows in rising order, whatever the threads do.
// Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
#include <type_traits>

#include "attention/attention.h"
#include "attention/attention_bwd_mask_cpu.h"
#include "attention/attention_bwd_tile_cpu.h"
#include "attention/attention_pack_cpu.h"
#include "attention/attention_packed_cpu.h"
#include "attention/ordered_turns.h"
#include "common/dropout_cpu.h"
#include "common/parallel.h"
#include "common/read_ahead.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

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

// Operand: what the five products multiply.
template <typename T, typename Element, typename Operand = T>
class AttentionBackward {
  static constexpr bool kPairs = kTerms<Operand> > 1;
  using Head = QuerySide<T, Operand>;
  using Keys = KeySide<T, Operand>;

 public:
  explicit AttentionBackward(const AttentionBwdParams& params)
      : p_(params),
        band_(make_band(params)),
        dropout_(make_dropout(params.dropout_p, params.rng_state)),
        group_(params.heads / params.heads_kv),
        width_(whole_vectors<T>(params.head_dim)),
        width_v_(whole_vectors<T>(params.head_dim_v)),
        depth_(elements_for<Operand>(params.head_dim)),
        depth_v_(elements_for<Operand>(params.head_dim_v)) {
    // Of packed sequences, as many as there were if all had the greatest length.
    const int64_t entries = is_packed(p_) ? (p_.packed_q.total + p_.seqlen_q - 1) / p_.seqlen_q : p_.batch;
    const int64_t pairs = entries * p_.heads_kv;
    threads_ = max_threads();
    splits_ = threads_ > 1 && pairs % threads_ != 0 && pairs < 4 * threads_ && p_.seqlen_k > kTileKeys;
    // About 256 KiB of keys, values and their gradients; small blocks where threads share a head, to start them early.
    const int64_t widest = max_of(width_, width_v_);
    block_tiles_ = splits_ ? 1 : widest <= 64 ? 4 : widest <= 128 ? 2 : 1;
    count_blocks();
    most_query_blocks_ = query_blocks_;
  }

  void run() {
    ScratchCursor size(nullptr);
    take_shared(size);
    Scratch shared(1, size.bytes());
    ScratchCursor cursor(shared.piece(0));
    take_shared(cursor);
    const MaskGradient<T> mask(p_, mask_partials_);
    const int64_t rows = p_.batch * p_.heads * most_query_blocks_;
    set_zero(mask_partials_, MaskGradient<T>::partial_count(p_));
    if (p_.dsinks) set_zero(sink_partials_, rows);
    if (splits_) set_zero(dq_counters_, rows);
    if (mask.takes_turns()) set_zero(mask_counters_, mask_counter_count());

    if (splits_) {
      for (int64_t i = 0; i < p_.batch * p_.heads; ++i) {
        entry(i / p_.heads).point_at_tensors(shared_heads_[i], i / p_.heads, i % p_.heads);
      }
      parallel_tasks(rows, [&](int64_t task, int) {
        const int64_t batch_head = task / most_query_blocks_, block = task % most_query_blocks_;
        const AttentionBackward one = entry(batch_head / p_.heads);
        if (block >= one.query_blocks_) return;
        one.prepare_rows(shared_heads_[batch_head], batch_head / p_.heads, batch_head % p_.heads, block);
      });
    }
    ScratchCursor thread_size(nullptr);
    take_thread(thread_size);
    Scratch threads(threads_, thread_size.bytes());
    const EntryTasks tasks(p_, [&](int64_t batch) { return p_.heads_kv * entry(batch).tasks_a_pair(); });
    parallel_tasks(tasks.count(), [&](int64_t number, int thread) {
      ScratchCursor thread_cursor(threads.piece(thread));
      const EntryTask task = tasks.at(number);
      ThreadArrays arrays = take_thread(thread_cursor);
      // Tasks are handed out in turn: of equal ones, the one after the other threads' is this thread's next.
      ReadAhead ahead;
      if (number + threads_ < tasks.count()) {
        const EntryTask next = tasks.at(number + threads_);
        entry(next.batch).read_ahead(ahead, next);
      }
      arrays.tile.ahead = &ahead;
      entry(task.batch).run_task(arrays, mask, task);
    });
    mask.reduce();
    if (p_.dsinks) reduce_sinks();
    if (is_packed(p_)) clear_all_gaps();
  }

 private:
  // Arrays of one thread. `heads`: the group of query heads, unless they are shared.
  struct ThreadArrays {
    TileBuffers<T, Operand> tile;
    Operand *k_t, *v_t, *k;
    T *dk, *dv;
    Head* heads;
  };
  static constexpr int64_t kTileElements = int64_t{kTileQueries} * kTileKeys;

  // The kernel of one batch entry.
  AttentionBackward entry(int64_t batch) const {
    AttentionBackward one = *this;
    narrow_to_entry(one.p_, batch);
    one.band_ = make_band(one.p_);
    one.count_blocks();
    return one;
  }
  // A sequence without keys has one block without keys, for dq.
  void count_blocks() {
    const int64_t tiles = (p_.seqlen_k + kTileKeys - 1) / kTileKeys;
    query_blocks_ = (p_.seqlen_q + kTileQueries - 1) / kTileQueries;
    key_blocks_ = max_of<int64_t>(1, (tiles + block_tiles_ - 1) / block_tiles_);
  }
  int64_t tasks_a_pair() const { return splits_ ? key_blocks_ : 1; }

  // The kernels can work on the tensor itself if it is made of T and its rows are whole vectors without gaps: a power
  // of two between rows would put them all into a few sets of L1.
  bool is_direct(const AttentionTensor& tensor, int64_t columns) const {
    return std::is_same_v<T, Element> && columns % Vec<T>::kLanes == 0 && tensor.stride_row == columns;
  }
  // The same for q and dout as left operands.
  bool is_left(const AttentionTensor& tensor, int64_t columns) const {
    return is_left_operand<Operand, Element>(tensor.stride_row, columns);
  }
  int64_t mask_counter_count() const { return p_.batch * p_.heads * key_blocks_ * query_blocks_; }

  void take_shared(ScratchCursor& cursor) {
    const int64_t heads = p_.batch * p_.heads;
    mask_partials_ = cursor.take<T>(MaskGradient<T>::partial_count(p_));
    sink_partials_ = cursor.take<double>(p_.dsinks ? heads * most_query_blocks_ : 0);
    mask_counters_ = cursor.take<int32_t>(MaskGradient<T>::sharers(p_) > 1 && p_.dmask ? mask_counter_count() : 0);
    dq_counters_ = cursor.take<int32_t>(splits_ ? heads * most_query_blocks_ : 0);
    shared_heads_ = cursor.take<Head>(splits_ ? heads : 0);
    for (int64_t batch = 0; splits_ && batch < p_.batch; ++batch) {
      entry(batch).take_rows(cursor, shared_heads_ ? shared_heads_ + batch * p_.heads : nullptr, p_.heads);
    }
  }

  Rows<const Operand> take_left(ScratchCursor& cursor, const AttentionTensor& tensor, int64_t columns) const {
    const int64_t width = left_width<Operand>(columns);
    return {cursor.take<Operand>(is_left(tensor, columns) ? 0 : p_.seqlen_q * width), width};
  }

  // Memory for the rows of `count` heads; with heads == nullptr it is only counted.
  void take_rows(ScratchCursor& cursor, Head* heads, int64_t count) const {
    const int64_t pairs = kPairs ? elements_for<Operand>(p_.seqlen_q) : 0;
    for (int64_t i = 0; i < count; ++i) {
      Head head;
      head.q = take_left(cursor, p_.q, p_.head_dim);
      head.dout = take_left(cursor, p_.dout, p_.head_dim_v);
      head.q_terms = {cursor.take<Operand>(pairs * width_), width_};
      head.dout_terms = {cursor.take<Operand>(pairs * width_v_), width_v_};
      head.dq = {cursor.take<T>(is_direct(p_.dq, p_.head_dim) ? 0 : p_.seqlen_q * width_), width_};
      head.lse = cursor.take<T>(p_.seqlen_q);
      head.delta = cursor.take<T>(p_.seqlen_q);
      if (heads) heads[i] = head;
    }
  }

  ThreadArrays take_thread(ScratchCursor& cursor) const {
    ThreadArrays arrays;
    arrays.tile.p = cursor.take<T>(kTileElements);
    arrays.tile.ds = cursor.take<T>(kTileElements);
    arrays.tile.dropped = cursor.take<T>(dropout_.active() ? kTileElements : 0);
    arrays.tile.slope = cursor.take<T>(p_.softcap != 0 ? kTileElements : 0);
    arrays.tile.left = cursor.take<Operand>(kPairs ? kTileElements / kTerms<Operand> : 0);
    const int64_t keys = block_tiles_ * kTileKeys;
    arrays.k_t = cursor.take<Operand>(keys * depth_);
    arrays.v_t = cursor.take<Operand>(keys * depth_v_);
    arrays.k = cursor.take<Operand>(is_direct(p_.k, p_.head_dim) ? 0 : keys / kTerms<Operand> * width_);
    arrays.dk = cursor.take<T>(is_direct(p_.dk, p_.head_dim) ? 0 : keys * width_);
    arrays.dv = cursor.take<T>(is_direct(p_.dv, p_.head_dim_v) ? 0 : keys * width_v_);
    arrays.heads = cursor.take<Head>(splits_ ? 0 : group_);
    if (!splits_) take_rows(cursor, arrays.heads, group_);
    return arrays;
  }

  void point_at_tensors(Head& head, int64_t batch, int64_t head_index) const {
    if (is_left(p_.q, p_.head_dim)) {
      head.q.data = reinterpret_cast<const Operand*>(row_of<Element>(p_.q, batch, head_index, 0));
    }
    if (is_left(p_.dout, p_.head_dim_v)) {
      head.dout.data = reinterpret_cast<const Operand*>(row_of<Element>(p_.dout, batch, head_index, 0));
    }
    if constexpr (std::is_same_v<T, Element>) {
      if (is_direct(p_.dq, p_.head_dim)) head.dq.data = row_of<T>(p_.dq, batch, head_index, 0);
    }
    if constexpr (!kPairs) {
      head.q_terms = head.q;
      head.dout_terms = head.dout;
    }
  }

  // Brings the query side of one block of rows into the form of QuerySide.
  void prepare_rows(const Head& head, int64_t batch, int64_t head_index, int64_t block) const {
    const int64_t row0 = block * kTileQueries;
    const int rows = static_cast<int>(min_of<int64_t>(kTileQueries, p_.seqlen_q - row0));
    const int head_dim = static_cast<int>(p_.head_dim), head_dim_v = static_cast<int>(p_.head_dim_v);
    const Element* q = row_of<Element>(p_.q, batch, head_index, row0);
    const Element* dout = row_of<Element>(p_.dout, batch, head_index, row0);
    const auto at = [&](Rows<const Operand> operand, int64_t first) {
      return const_cast<Operand*>(operand.data) + first * operand.stride;
    };
    if (!is_left(p_.q, p_.head_dim)) {
      pack_left(at(head.q, row0), head.q.stride, q, p_.q.stride_row, rows, head_dim);
    }
    if (!is_left(p_.dout, p_.head_dim_v)) {
      pack_left(at(head.dout, row0), head.dout.stride, dout, p_.dout.stride_row, rows, head_dim_v);
    }
    if constexpr (kPairs) {
      pack_right(at(head.q_terms, row0 / 2), width_, q, p_.q.stride_row, rows, head_dim);
      pack_right(at(head.dout_terms, row0 / 2), width_v_, dout, p_.dout.stride_row, rows, head_dim_v);
    }
    prepare_statistics(head, batch, head_index, row0, rows);
  }

  // dots[r] = out_r . dout_r for a tile's rows, summed one term after the other as the matrix product dout v^T sums: of
  // a row that sees one key, out is that key's value, and ds = p * (dp - delta) cancels exactly. Hence transposed.
  static void row_dots(T* dots, const Element* out, int64_t stride_out, const Element* dout, int64_t stride_dout,
                       int rows, int columns) {
    static_assert(kTileQueries == kTileKeys, "pack_keys transposes rows of queries");
    using V = Vec<T>;
    constexpr int kStep = 16;
    alignas(64) Operand out_t[kStep * kTileQueries], dout_t[kStep * kTileQueries];
    for (int r = 0; r < kTileQueries; ++r) dots[r] = 0;
    for (int c = 0; c < columns; c += kStep) {
      const int step = min_of(kStep, columns - c);
      pack_keys(out_t, out + c, stride_out, rows, step);
      pack_keys(dout_t, dout + c, stride_dout, rows, step);
      for (int r = 0; r < rows; r += V::kLanes) {
        V sum = V::load(dots + r);
        for (int at = r; at < elements_for<Operand>(step) * kTileQueries; at += kTileQueries) {
          sum = fma(Vec<Operand>::load_as(dout_t + at), Vec<Operand>::load_as(out_t + at), sum);
        }
        sum.store(dots + r);
      }
    }
  }

  void prepare_statistics(const Head& head, int64_t batch, int64_t head_index, int64_t row0, int rows) const {
    const int64_t first = lse_offset(p_, batch, head_index) + row0;
    const T* lse = static_cast<const T*>(p_.lse) + first;
    const T* dlse = p_.dlse ? static_cast<const T*>(p_.dlse) + first : nullptr;
    alignas(64) T dots[kTileQueries];
    row_dots(dots, row_of<Element>(p_.out, batch, head_index, row0), p_.out.stride_row,
             row_of<Element>(p_.dout, batch, head_index, row0), p_.dout.stride_row, rows,
             static_cast<int>(p_.head_dim_v));
    double dsink = 0;
    for (int r = 0; r < rows; ++r) {
      const bool sees_nothing = lse[r] == -static_cast<T>(__builtin_inf());
      const T delta = sees_nothing ? T(0) : dots[r] - (dlse ? dlse[r] : T(0));
      head.delta[row0 + r] = delta;
      head.lse[row0 + r] = sees_nothing ? static_cast<T>(__builtin_inf()) : lse[r];
      // p of the sink has no value of its own: ds = p * (0 - delta).
      if (p_.dsinks && !sees_nothing) {
        dsink -= __builtin_exp(static_cast<const T*>(p_.sinks)[head_index] - static_cast<double>(lse[r])) * delta;
      }
    }
    if (p_.dsinks) sink_partials_[(batch * p_.heads + head_index) * most_query_blocks_ + row0 / kTileQueries] = dsink;
  }

  // Lists what the task will read, first what it needs first.
  void read_ahead(ReadAhead& ahead, EntryTask task) const {
    if (splits_) return;
    const auto add = [&](const AttentionTensor& tensor, int64_t head, int64_t rows, int64_t columns) {
      const int64_t bytes = sizeof(Element);
      ahead.add(row_of<Element>(tensor, task.batch, head, 0), rows, columns * bytes, tensor.stride_row * bytes);
    };
    const int64_t first_head = task.index * group_;
    add(p_.out, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.dout, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.k, task.index, p_.seqlen_k, p_.head_dim);
    add(p_.v, task.index, p_.seqlen_k, p_.head_dim_v);
    add(p_.q, first_head, p_.seqlen_q, p_.head_dim);
    // Five products a tile. A quarter of the tiles may be hidden.
    const int64_t tiles = query_blocks_ * ((p_.seqlen_k + kTileKeys - 1) / kTileKeys);
    ahead.spread(tiles * 5 * (kTileQueries / kTileRows) * 3 / 4);
  }

  void run_task(const ThreadArrays& arrays, const MaskGradient<T>& mask, EntryTask task) const {
    const int64_t batch = task.batch, head_kv = task.index / tasks_a_pair();
    Head* heads = splits_ ? shared_heads_ + batch * p_.heads + head_kv * group_ : arrays.heads;
    if (!splits_) {
      for (int64_t g = 0; g < group_; ++g) {
        point_at_tensors(heads[g], batch, head_kv * group_ + g);
        for (int64_t block = 0; block < query_blocks_; ++block) {
          prepare_rows(heads[g], batch, head_kv * group_ + g, block);
        }
      }
    }
    const int64_t first_block = splits_ ? task.index % key_blocks_ : 0,
                  end_block = splits_ ? first_block + 1 : key_blocks_;
    for (int64_t block = first_block; block < end_block; ++block) {
      run_block(arrays, mask, heads, batch, head_kv, block);
    }
  }

  // All rows of all heads of the group against one block of keys.
  void run_block(const ThreadArrays& arrays, const MaskGradient<T>& mask, const Head* heads, int64_t batch,
                 int64_t head_kv, int64_t block) const {
    const int64_t key0 = block * block_tiles_ * kTileKeys;
    const int keys = static_cast<int>(min_of<int64_t>(block_tiles_ * kTileKeys, p_.seqlen_k - key0));
    const int head_dim = static_cast<int>(p_.head_dim), head_dim_v = static_cast<int>(p_.head_dim_v);
    const Element* k = row_of<Element>(p_.k, batch, head_kv, key0);
    const Element* v = row_of<Element>(p_.v, batch, head_kv, key0);
    for (int key = 0; key < keys; key += kTileKeys) {
      const int in_tile = min_of(kTileKeys, keys - key);
      pack_keys(arrays.k_t + key * depth_, k + key * p_.k.stride_row, p_.k.stride_row, in_tile, head_dim);
      pack_keys(arrays.v_t + key * depth_v_, v + key * p_.v.stride_row, p_.v.stride_row, in_tile, head_dim_v);
    }
    Keys first{arrays.k_t, arrays.v_t, {arrays.k, width_}, {arrays.dk, width_}, {arrays.dv, width_v_}};
    Element* dk = row_of<Element>(p_.dk, batch, head_kv, key0);
    Element* dv = row_of<Element>(p_.dv, batch, head_kv, key0);
    const bool dk_direct = is_direct(p_.dk, p_.head_dim), dv_direct = is_direct(p_.dv, p_.head_dim_v);
    if constexpr (std::is_same_v<T, Element>) {
      if (is_direct(p_.k, p_.head_dim)) first.k.data = k;
      if (dk_direct) first.dk.data = dk;
      if (dv_direct) first.dv.data = dv;
    }
    if (!is_direct(p_.k, p_.head_dim)) pack_right(arrays.k, width_, k, p_.k.stride_row, keys, head_dim);
    if (query_blocks_ == 0) start_keys(first, keys);

    for (int64_t g = 0; g < group_; ++g) {
      run_head(arrays.tile, mask, heads[g], first, batch, head_kv * group_ + g, block);
    }
    if (!dk_direct) store_rows<T>(dk, p_.dk.stride_row, Rows<const T>{first.dk.data, width_}, keys, head_dim);
    if (!dv_direct) store_rows<T>(dv, p_.dv.stride_row, Rows<const T>{first.dv.data, width_v_}, keys, head_dim_v);
  }

  // Where the first tile does not write all of its rows or keys, or there is none.
  void start_rows(const Head& head, int64_t row0, int rows) const {
    set_zero(head.dq.data + row0 * width_, rows * width_);
  }
  void start_keys(const Keys& tile, int keys) const {
    set_zero(tile.dk.data, keys * width_);
    set_zero(tile.dv.data, keys * width_v_);
  }

  void run_head(const TileBuffers<T, Operand>& buffers, const MaskGradient<T>& mask, const Head& head,
                const Keys& first, int64_t batch, int64_t head_index, int64_t block) const {
    const HeadScores<T> scores = make_head_scores<T>(p_, batch, head_index);
    const int64_t batch_head = batch * p_.heads + head_index;
    const OrderedTurns dq_turns(splits_ ? dq_counters_ + batch_head * most_query_blocks_ : nullptr);
    const OrderedTurns mask_turns(
        mask.takes_turns() ? mask_counters_ + (mask.place(batch, head_index) * key_blocks_ + block) * query_blocks_
                           : nullptr);
    const int32_t mask_turn = mask.turn(batch, head_index), dq_turn = static_cast<int32_t>(block);
    const int64_t key_begin = block * block_tiles_ * kTileKeys;
    const int64_t key_end = min_of(key_begin + block_tiles_ * kTileKeys, p_.seqlen_k);
    const IndexRange seeing = band_.rows_that_see({key_begin, key_end});

    for (int64_t query_block = 0; query_block < query_blocks_; ++query_block) {
      TilePlace place{};
      place.row0 = query_block * kTileQueries;
      place.rows = static_cast<int>(min_of<int64_t>(kTileQueries, p_.seqlen_q - place.row0));
      const IndexRange rows = {place.row0, place.row0 + place.rows};
      const bool in_band = rows.begin < seeing.end && rows.end > seeing.begin;
      if (key_begin == key_end) start_rows(head, place.row0, place.rows);
      for (int64_t key0 = key_begin; key0 < key_end; key0 += kTileKeys) {
        uint64_t visible[kTileQueries], kept[kTileQueries];
        place.key0 = key0;
        place.keys = static_cast<int>(min_of<int64_t>(kTileKeys, key_end - key0));
        const TileView view = in_band ? scores.view(rows, key0, visible) : TileView::kHidden;
        const Keys tile = tile_at(first, key0 - key_begin);
        const bool is_whole = view == TileView::kFull;
        const bool starts_dq = key0 == 0, starts_dkv = query_block == 0 && head_index % group_ == 0;
        if (starts_dq && !is_whole) start_rows(head, place.row0, place.rows);
        if (starts_dkv && !is_whole) start_keys(tile, place.keys);
        place.starts_dq = starts_dq && is_whole, place.starts_dkv = starts_dkv && is_whole;
        const auto add_to_mask = [&](const T* ds) {
          mask_turns.wait(query_block, mask_turn);
          if (mask.kind() == MaskGradientKind::kPerRow) dq_turns.wait(query_block, dq_turn);
          mask.add_tile(ds, batch, head_index, place);
        };
        if (view == TileView::kHidden) {
          if (mask.kind() == MaskGradientKind::kFull) add_to_mask(nullptr);
          continue;
        }
        place.visible = view == TileView::kPartial ? visible : nullptr;
        if (dropout_.active()) {
          for (int r = 0; r < place.rows; ++r) {
            kept[r] =
                dropout_.kept_columns(static_cast<uint32_t>(batch_head), static_cast<uint32_t>(place.row0 + r), key0);
          }
          place.kept = kept;
        }
        mask.prefetch(batch, head_index, place);
        const auto take_turn = [&] { dq_turns.wait(query_block, dq_turn); };
        backward_tile(p_, scores, head, tile, buffers, place, static_cast<T>(dropout_.keep_scale),
                      mask.kind() != MaskGradientKind::kNone, add_to_mask, take_turn);
      }
      mask_turns.wait(query_block, mask_turn);
      mask_turns.done(query_block, mask_turn);
      dq_turns.wait(query_block, dq_turn);
      if (block == key_blocks_ - 1 && !is_direct(p_.dq, p_.head_dim)) {
        store_rows<T>(row_of<Element>(p_.dq, batch, head_index, place.row0), p_.dq.stride_row,
                      Rows<const T>{head.dq.data + place.row0 * width_, width_}, place.rows,
                      static_cast<int>(p_.head_dim));
      }
      dq_turns.done(query_block, dq_turn);
    }
  }

  Keys tile_at(const Keys& first, int64_t key) const {
    return {first.k_t + key * depth_,
            first.v_t + key * depth_v_,
            {first.k.data + key / kTerms<Operand> * width_, width_},
            {first.dk.data + key * width_, width_},
            {first.dv.data + key * width_v_, width_v_}};
  }

  void reduce_sinks() const {
    for (int64_t head = 0; head < p_.heads; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < p_.batch; ++batch) {
        for (int64_t block = 0; block < most_query_blocks_; ++block) {
          sum += sink_partials_[(batch * p_.heads + head) * most_query_blocks_ + block];
        }
      }
      static_cast<T*>(p_.dsinks)[head] = static_cast<T>(sum);
    }
  }

  // Gradients of rows and keys that no sequence has are 0.
  void clear_all_gaps() const {
    clear_gaps(p_.dq, p_.dtype, p_.heads, p_.head_dim, p_.packed_q, p_.batch, p_.seqlen_q);
    clear_gaps(p_.dk, p_.dtype, p_.heads_kv, p_.head_dim, p_.packed_k, p_.batch, p_.seqlen_k);
    clear_gaps(p_.dv, p_.dtype, p_.heads_kv, p_.head_dim_v, p_.packed_k, p_.batch, p_.seqlen_k);
  }

  AttentionBwdParams p_;  // of the call, or of one of its sequences
  Band band_;
  Dropout dropout_;
  int64_t group_;
  // Rows of q, k and of v, out in whole vectors.
  int64_t width_, width_v_;
  // How many elements of Operand hold head_dim and head_dim_v terms.
  int64_t depth_, depth_v_;
  int threads_;
  // True: threads share the heads, each working on other keys.
  bool splits_;
  int64_t block_tiles_, key_blocks_, query_blocks_;
  int64_t most_query_blocks_;  // of the longest sequence

  T* mask_partials_ = nullptr;
  double* sink_partials_ = nullptr;
  int32_t *mask_counters_ = nullptr, *dq_counters_ = nullptr;
  Head* shared_heads_ = nullptr;
};

}  // namespace

#if defined(__AVX512BF16__)

void attention_bwd_cpu(const AttentionBwdParams& p) {
  if (p.dtype != DType::kBFloat16) return isa_avx512::attention_bwd_cpu(p);
  AttentionBackward<float, BFloat16, BFloat16Pair>(p).run();
}

#else

void attention_bwd_cpu(const AttentionBwdParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return AttentionBackward<float, BFloat16>(p).run();
    case DType::kFloat16:
      return AttentionBackward<float, Float16>(p).run();
    case DType::kFloat64:
      return AttentionBackward<double, double>(p).run();
    default:
      return AttentionBackward<float, float>(p).run();
  }
}

#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
