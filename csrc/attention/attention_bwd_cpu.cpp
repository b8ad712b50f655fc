// Backward attention on the CPU. p is recomputed from lse; README.md derives the formulas.
//   dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale * ds k,  dk = scale * ds^T q,  delta = sum(dout * out) -
//   dlse
// Work:    a task is one (batch, kv head) with its group of query heads; where there are too few of those for the
//          threads, one block of keys of it, or, of few keys, one block of rows. Keys are the outer loop, so dk and dv
//          are complete when a block of keys is. Of packed sequences the tasks with most work go first.
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
    if (splits_) set_zero(dkv_counters_, dkv_counter_count());
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
  // Where the gradients of a key head are summed up that several tasks add to.
  struct KeyGradients {
    T *dk, *dv;
  };
  static constexpr int64_t kTileElements = int64_t{kTileQueries} * kTileKeys;
  static constexpr int kMostTilesAtHand = 4;

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
    const int64_t tiles = (p_.seqlen_k + kTileKeys - 1) / kTileKeys, widest = max_of(width_, width_v_);
    sees_all_keys_ = tiles <= most_tiles_at_hand();
    // About 256 KiB of keys, values and their gradients; small blocks where threads share a head, to start them early.
    const int64_t usual = splits_ ? 1 : widest <= 64 ? 4 : widest <= 128 ? 2 : 1;
    block_tiles_ = sees_all_keys_ ? max_of<int64_t>(tiles, 1) : usual;
    query_blocks_ = (p_.seqlen_q + kTileQueries - 1) / kTileQueries;
    key_blocks_ = max_of<int64_t>(1, (tiles + block_tiles_ - 1) / block_tiles_);
  }
  // Whether all keys of a row are at hand at once must not depend on the number of threads: it changes roundings.
  int64_t most_tiles_at_hand() const {
    const int64_t widest = max_of(width_, width_v_);
    return widest <= 64 ? 4 : widest <= 128 ? 3 : 2;
  }
  // The blocks of rows of the query heads that share a key head.
  int64_t row_blocks() const { return group_ * query_blocks_; }
  int64_t tasks_a_pair() const {
    if (!splits_) return 1;
    return sees_all_keys_ ? max_of<int64_t>(row_blocks(), 1) : key_blocks_;
  }

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
  int64_t dkv_counter_count() const { return p_.batch * p_.heads_kv * kMostTilesAtHand; }

  void take_shared(ScratchCursor& cursor) {
    const int64_t heads = p_.batch * p_.heads;
    mask_partials_ = cursor.take<double>(MaskGradient<T>::partial_count(p_));
    sink_partials_ = cursor.take<double>(p_.dsinks ? heads * most_query_blocks_ : 0);
    mask_counters_ = cursor.take<int32_t>(MaskGradient<T>::sharers(p_) > 1 && p_.dmask ? mask_counter_count() : 0);
    dq_counters_ = cursor.take<int32_t>(splits_ ? heads * most_query_blocks_ : 0);
    dkv_counters_ = cursor.take<int32_t>(splits_ ? dkv_counter_count() : 0);
    shared_heads_ = cursor.take<Head>(splits_ ? heads : 0);
    shared_keys_ = cursor.take<KeyGradients>(splits_ ? p_.batch * p_.heads_kv : 0);
    for (int64_t batch = 0; splits_ && batch < p_.batch; ++batch) {
      const AttentionBackward one = entry(batch);
      one.take_rows(cursor, shared_heads_ ? shared_heads_ + batch * p_.heads : nullptr, p_.heads);
      for (int64_t pair = 0; one.sees_all_keys_ && pair < p_.heads_kv; ++pair) {
        const KeyGradients keys = {cursor.take<T>(is_direct(p_.dk, p_.head_dim) ? 0 : one.p_.seqlen_k * width_),
                                   cursor.take<T>(is_direct(p_.dv, p_.head_dim_v) ? 0 : one.p_.seqlen_k * width_v_)};
        if (shared_keys_) shared_keys_[batch * p_.heads_kv + pair] = keys;
      }
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
      head.dlse = cursor.take<T>(p_.seqlen_q);
      head.delta = cursor.take<T>(sees_all_keys_ ? 0 : p_.seqlen_q);
      if (heads) heads[i] = head;
    }
  }

  ThreadArrays take_thread(ScratchCursor& cursor) const {
    ThreadArrays arrays;
    const int64_t tiles = (p_.seqlen_k + kTileKeys - 1) / kTileKeys;
    const int64_t at_hand = max_of<int64_t>(1, min_of(tiles, most_tiles_at_hand()));
    arrays.tile.p = cursor.take<T>(at_hand * kTileElements);
    arrays.tile.ds = cursor.take<T>(at_hand * kTileElements);
    arrays.tile.slope = cursor.take<T>(p_.softcap != 0 ? at_hand * kTileElements : 0);
    arrays.tile.left = cursor.take<Operand>(kPairs ? kTileElements / kTerms<Operand> : 0);
    // A packed sequence may have its keys at hand where the longest one has not.
    const int64_t keys = max_of(block_tiles_, at_hand) * kTileKeys;
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

  void prepare_statistics(const Head& head, int64_t batch, int64_t head_index, int64_t row0, int rows) const {
    const int64_t first = lse_offset(p_, batch, head_index) + row0;
    const T* lse = static_cast<const T*>(p_.lse) + first;
    const T* dlse = p_.dlse ? static_cast<const T*>(p_.dlse) + first : nullptr;
    for (int r = 0; r < rows; ++r) {
      const bool sees_nothing = lse[r] == -static_cast<T>(__builtin_inf());
      head.lse[row0 + r] = sees_nothing ? static_cast<T>(__builtin_inf()) : lse[r];
      head.dlse[row0 + r] = sees_nothing || !dlse ? T(0) : dlse[r];
    }
    if (sees_all_keys_) return;
    alignas(64) T dots[kTileQueries];
    row_dots<Operand>(dots, row_of<Element>(p_.out, batch, head_index, row0), p_.out.stride_row,
                      row_of<Element>(p_.dout, batch, head_index, row0), p_.dout.stride_row, rows,
                      static_cast<int>(p_.head_dim_v),
                      chain_length(p_.seqlen_q, p_.seqlen_k, max_of(p_.head_dim, p_.head_dim_v)));
    double dsink = 0;
    for (int64_t r = row0; r < row0 + rows; ++r) {
      const T delta = head.lse[r] < __builtin_inf() ? dots[r - row0] : T(0);
      head.delta[r] = delta;
      dsink += sink_probability(head, head_index, r) * (static_cast<double>(head.dlse[r]) - delta);
    }
    set_sink_gradient(batch, head_index, row0, dsink);
  }

  // p of the sink has no value of its own: its ds = p * (dlse - delta).
  void set_sink_gradient(int64_t batch, int64_t head_index, int64_t row0, double gradient) const {
    if (p_.dsinks == nullptr) return;
    sink_partials_[(batch * p_.heads + head_index) * most_query_blocks_ + row0 / kTileQueries] = gradient;
  }
  // 0 without a sink.
  double sink_probability(const Head& head, int64_t head_index, int64_t row) const {
    if (!p_.sinks) return 0;
    return __builtin_exp(static_cast<const T*>(p_.sinks)[head_index] - static_cast<double>(head.lse[row]));
  }

  // Lists what the task will read, first what it needs first.
  void read_ahead(ReadAhead& ahead, EntryTask task) const {
    if (splits_) return;
    const auto add = [&](const AttentionTensor& tensor, int64_t head, int64_t rows, int64_t columns) {
      const int64_t bytes = sizeof(Element);
      ahead.add(row_of<Element>(tensor, task.batch, head, 0), rows, columns * bytes, tensor.stride_row * bytes);
    };
    const int64_t first_head = task.index * group_;
    if (!sees_all_keys_) add(p_.out, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.dout, first_head, p_.seqlen_q, p_.head_dim_v);
    add(p_.k, task.index, p_.seqlen_k, p_.head_dim);
    add(p_.v, task.index, p_.seqlen_k, p_.head_dim_v);
    add(p_.q, first_head, p_.seqlen_q, p_.head_dim);
    // Five products a tile. A quarter of the tiles may be hidden.
    const int64_t tiles = query_blocks_ * ((p_.seqlen_k + kTileKeys - 1) / kTileKeys);
    ahead.spread(tiles * 5 * (kTileQueries / kTileRows) * 3 / 4);
  }

  void run_task(const ThreadArrays& arrays, const MaskGradient<T>& mask, EntryTask task) const {
    const int64_t batch = task.batch, head_kv = task.index / tasks_a_pair(), part = task.index % tasks_a_pair();
    if (splits_) {
      const Head* heads = shared_heads_ + batch * p_.heads + head_kv * group_;
      const IndexRange rows =
          sees_all_keys_ ? IndexRange{part, min_of(part + 1, row_blocks())} : IndexRange{0, row_blocks()};
      return run_block(arrays, mask, heads, batch, head_kv, sees_all_keys_ ? 0 : part, rows);
    }
    for (int64_t g = 0; g < group_; ++g) {
      point_at_tensors(arrays.heads[g], batch, head_kv * group_ + g);
      for (int64_t block = 0; block < query_blocks_; ++block) {
        prepare_rows(arrays.heads[g], batch, head_kv * group_ + g, block);
      }
    }
    for (int64_t block = 0; block < key_blocks_; ++block) {
      run_block(arrays, mask, arrays.heads, batch, head_kv, block, {0, row_blocks()});
    }
  }

  // Blocks of rows of the group's heads, counted head by head, against one block of keys.
  void run_block(const ThreadArrays& arrays, const MaskGradient<T>& mask, const Head* heads, int64_t batch,
                 int64_t head_kv, int64_t block, IndexRange row_range) const {
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
    if (splits_ && sees_all_keys_) {
      const KeyGradients& shared = shared_keys_[batch * p_.heads_kv + head_kv];
      first.dk.data = shared.dk;
      first.dv.data = shared.dv;
    }
    Element* dk = row_of<Element>(p_.dk, batch, head_kv, key0);
    Element* dv = row_of<Element>(p_.dv, batch, head_kv, key0);
    const bool dk_direct = is_direct(p_.dk, p_.head_dim), dv_direct = is_direct(p_.dv, p_.head_dim_v);
    if constexpr (std::is_same_v<T, Element>) {
      if (is_direct(p_.k, p_.head_dim)) first.k.data = k;
      if (dk_direct) first.dk.data = dk;
      if (dv_direct) first.dv.data = dv;
    }
    if (!is_direct(p_.k, p_.head_dim)) pack_right(arrays.k, width_, k, p_.k.stride_row, keys, head_dim);
    if (row_blocks() == 0) start_keys(first, keys);
    for (int64_t rows = row_range.begin; rows < row_range.end; ++rows) {
      run_rows(arrays.tile, mask, heads[rows / query_blocks_], first, batch, head_kv, block, rows);
    }
    if (row_range.end < row_blocks()) return;
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

  // What a block of rows does with a tile of keys.
  struct PlacedTile {
    BackwardTile<T, Operand> tile;
    TileLimits limits;
    uint64_t visible[kTileQueries], kept[kTileQueries];
    bool hidden;
  };

  // One block of rows against one block of keys. `rows` counts the group's blocks of rows.
  void run_rows(const TileBuffers<T, Operand>& buffers, const MaskGradient<T>& mask, const Head& head,
                const Keys& first, int64_t batch, int64_t head_kv, int64_t block, int64_t rows) const {
    const int64_t head_index = head_kv * group_ + rows / query_blocks_, query_block = rows % query_blocks_;
    const int64_t batch_head = batch * p_.heads + head_index;
    const HeadScores<T> scores = make_head_scores<T>(p_, batch, head_index);
    const OrderedTurns dq_turns(splits_ && !sees_all_keys_ ? dq_counters_ + batch_head * most_query_blocks_ : nullptr);
    const OrderedTurns dkv_turns(
        splits_ && sees_all_keys_ ? dkv_counters_ + (batch * p_.heads_kv + head_kv) * kMostTilesAtHand : nullptr);
    const OrderedTurns mask_turns(
        mask.takes_turns() ? mask_counters_ + (mask.place(batch, head_index) * key_blocks_ + block) * query_blocks_
                           : nullptr);
    const int32_t mask_turn = mask.turn(batch, head_index), dq_turn = static_cast<int32_t>(block);
    const int32_t dkv_turn = static_cast<int32_t>(rows);
    const int64_t key_begin = block * block_tiles_ * kTileKeys;
    const int64_t key_end = min_of(key_begin + block_tiles_ * kTileKeys, p_.seqlen_k);
    const int64_t row0 = query_block * kTileQueries;
    const int row_count = static_cast<int>(min_of<int64_t>(kTileQueries, p_.seqlen_q - row0));

    PlacedTile placed[kMostTilesAtHand];
    T weight[kTileQueries], delta[kTileQueries];
    RowTerms<T> terms{head.delta + row0, head.dlse + row0, nullptr};
    const int tiles = static_cast<int>((key_end - key_begin + kTileKeys - 1) / kTileKeys);
    if (tiles == 0) start_rows(head, row0, row_count);
    const int at_once = sees_all_keys_ ? max_of(tiles, 1) : 1;
    for (int tile0 = 0; tile0 < max_of(tiles, 1); tile0 += at_once) {
      const int count = min_of(at_once, tiles - tile0);
      for (int t = 0; t < count; ++t) {
        const int64_t key = (tile0 + t) * kTileKeys;
        place_tile(placed[t], scores, head, batch_head, row0, row_count, key_begin + key, key_end);
        TilePlace& place = placed[t].tile.place;
        const bool is_whole = !placed[t].hidden && place.visible == nullptr;
        const bool starts_dq = place.key0 == 0, starts_dkv = rows == 0;
        placed[t].tile.keys = tile_at(first, key);
        if (starts_dq && !is_whole) start_rows(head, row0, row_count);
        // Nobody else touches them before the turn of these rows is over.
        if (starts_dkv && !is_whole) start_keys(placed[t].tile.keys, place.keys);
        place.starts_dq = starts_dq && is_whole, place.starts_dkv = starts_dkv && is_whole;
        if (placed[t].hidden) continue;
        placed[t].tile.buffers = buffers_at(buffers, t);
        placed[t].limits = placed[t].tile.limits();
        mask.prefetch(batch, head_index, placed[t].tile.place);
        probabilities_and_gradients(placed[t].tile, placed[t].limits);
      }
      if (sees_all_keys_) {
        terms = {delta, head.dlse + row0, weight};
        const double dsink = sum_all_keys(weight, delta, placed, count, head, head_index, row0, row_count);
        set_sink_gradient(batch, head_index, row0, dsink);
      }
      for (int t = 0; t < count; ++t) {
        const auto take_dkv = [&] { dkv_turns.wait(tile0 + t, dkv_turn); };
        const auto add_to_mask = [&](const T* ds) {
          mask_turns.wait(query_block, mask_turn);
          if (mask.kind() == MaskGradientKind::kPerRow) dq_turns.wait(query_block, dq_turn);
          if (mask.kind() == MaskGradientKind::kPerKey) take_dkv();
          mask.add_tile(ds, batch, head_index, placed[t].tile.place);
        };
        if (!placed[t].hidden) {
          add_gradients(placed[t].tile, placed[t].limits, terms, mask.kind() != MaskGradientKind::kNone, add_to_mask,
                        take_dkv, [&] { dq_turns.wait(query_block, dq_turn); });
        } else if (mask.kind() == MaskGradientKind::kFull) {
          add_to_mask(nullptr);
        }
        take_dkv();
        dkv_turns.done(tile0 + t, dkv_turn);
      }
    }
    mask_turns.wait(query_block, mask_turn);
    mask_turns.done(query_block, mask_turn);
    dq_turns.wait(query_block, dq_turn);
    if (block == key_blocks_ - 1 && !is_direct(p_.dq, p_.head_dim)) {
      store_rows<T>(row_of<Element>(p_.dq, batch, head_index, row0), p_.dq.stride_row,
                    Rows<const T>{head.dq.data + row0 * width_, width_}, row_count, static_cast<int>(p_.head_dim));
    }
    dq_turns.done(query_block, dq_turn);
  }

  // Which keys from key0 on the rows see, and which of them dropout keeps.
  void place_tile(PlacedTile& placed, const HeadScores<T>& scores, const Head& head, int64_t batch_head, int64_t row0,
                  int rows, int64_t key0, int64_t key_end) const {
    TilePlace& place = placed.tile.place;
    place = {row0,    key0,    rows,  static_cast<int>(min_of<int64_t>(kTileKeys, key_end - key0)),
             nullptr, nullptr, false, false};
    const TileView view = scores.view({row0, row0 + rows}, key0, placed.visible);
    placed.hidden = view == TileView::kHidden;
    if (placed.hidden) return;
    if (view == TileView::kPartial) place.visible = placed.visible;
    if (dropout_.active()) {
      for (int r = 0; r < rows; ++r) {
        placed.kept[r] =
            dropout_.kept_columns(static_cast<uint32_t>(batch_head), static_cast<uint32_t>(row0 + r), key0);
      }
      place.kept = placed.kept;
    }
    placed.tile.params = &p_;
    placed.tile.scores = &scores;
    placed.tile.head = &head;
    placed.tile.keep_scale = static_cast<T>(dropout_.keep_scale);
  }

  // The terms of rows whose probabilities are all at hand, and their part of the sink's gradient.
  double sum_all_keys(T* weight, T* delta, const PlacedTile* placed, int count, const Head& head, int64_t head_index,
                      int64_t row0, int rows) const {
    ProbabilityTile<T> tiles[kMostTilesAtHand];
    int seen = 0;
    for (int t = 0; t < count; ++t) {
      const BackwardTile<T, Operand>& tile = placed[t].tile;
      if (!placed[t].hidden) tiles[seen++] = {tile.place, tile.buffers.p, tile.buffers.ds};
    }
    sum_rows(weight, delta, tiles, seen, rows, static_cast<T>(dropout_.keep_scale));
    double dsink = 0;
    for (int r = 0; r < rows; ++r) {
      const double sink = sink_probability(head, head_index, row0 + r), sum = weight[r] + sink;
      const double scale = sum > 0 ? 1 / sum : 0, row_delta = delta[r] * scale;
      weight[r] = static_cast<T>(scale);
      delta[r] = static_cast<T>(row_delta);
      dsink += sink * scale * (head.dlse[row0 + r] - row_delta);
    }
    return dsink;
  }

  static TileBuffers<T, Operand> buffers_at(const TileBuffers<T, Operand>& first, int tile) {
    const int64_t at = tile * kTileElements;
    return {first.p + at, first.ds + at, first.slope ? first.slope + at : nullptr, first.left, first.ahead};
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
  // True: a task holds the probabilities of its rows for all keys, and threads that share a head work on other rows.
  bool sees_all_keys_;
  int64_t block_tiles_, key_blocks_, query_blocks_;
  int64_t most_query_blocks_;  // of the longest sequence

  double *mask_partials_ = nullptr, *sink_partials_ = nullptr;
  int32_t *mask_counters_ = nullptr, *dq_counters_ = nullptr, *dkv_counters_ = nullptr;
  Head* shared_heads_ = nullptr;
  KeyGradients* shared_keys_ = nullptr;
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
