// Forward attention for a few queries against many keys, as in token by token generation.
// Work:    one task per (batch, kv head, slice of the keys); the query heads that share a kv head share one read of it.
//          A second pass joins the slices, which depend on the shapes only: results are equal at any number of threads.
// Memory:  keys and values are read in place, once: that is what takes the time.
// Numbers: as in attention_fwd_cpu.cpp.
// Source:  Dao et al., "Flash-Decoding for long-context inference", 2023 (the slices).
#include "attention/attention_decode_cpu.h"

#include "attention/attention_finish_cpu.h"
#include "attention/attention_pack_cpu.h"
#include "attention/attention_packed_cpu.h"
#include "attention/attention_rows_cpu.h"
#include "attention/attention_scores_cpu.h"
#include "attention/attention_tile_cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Rows (query heads x queries) of one task; a larger group of heads takes several.
constexpr int kMostRows = 32;
// Enough tasks to balance a few threads, none shorter than it takes to hide its own start.
constexpr int64_t kWantedTasks = 64;
constexpr int64_t kShortestSlice = 4 * kTileKeys;

// Where a tile's keys and values are, and the next tile's keys: one behind the other, ...
template <typename Element>
struct StridedTile {
  const Element *k, *v, *next_k;
  int64_t stride_k, stride_v;
  FASTATTN_INLINE const Element* k_row(int64_t key) const { return k + key * stride_k; }
  FASTATTN_INLINE const Element* v_row(int64_t key) const { return v + key * stride_v; }
  FASTATTN_INLINE const Element* next_k_row(int64_t key) const { return next_k + key * stride_k; }
};

// ... or anywhere.
template <typename Element>
struct ScatteredTile {
  const Element *k[kTileKeys], *v[kTileKeys], *next_k[kTileKeys];
  FASTATTN_INLINE const Element* k_row(int64_t key) const { return k[key]; }
  FASTATTN_INLINE const Element* v_row(int64_t key) const { return v[key]; }
  FASTATTN_INLINE const Element* next_k_row(int64_t key) const { return next_k[key]; }
};

// dots[r][key] = q[r] . k[key] for kRows rows and the keys of the tile, read in place: one accumulator a (row, key)
// pair, as many as a vector has lanes, turned into one vector of sums by a transposition. On the way it asks for what
// is read next, the tile's values and the next tile's keys: the hardware's own prefetchers miss this pattern, and
// without the hints a core draws a third of the memory's speed.
template <int kRows, bool kPrefetch, typename Element, typename T, typename Tile>
__attribute__((noinline)) void dot_tile(T* dots, const T* q, int depth, const Tile& tile, int keys) {
  using V = Vec<T>;
  constexpr int kPairs = V::kLanes, kKeys = kPairs / kRows;
  for (int key0 = 0; key0 < keys; key0 += kKeys) {
    V sums[kPairs];
    unroll<kPairs>(FASTATTN_LAMBDA(i) { sums[i] = V::zero(); });
    // Past the last key the last one is read again: those dots are hidden later.
    const Element *row[kKeys], *next_k[kKeys], *next_v[kKeys];
    unroll<kKeys>(FASTATTN_LAMBDA(j) {
      const int64_t key = min_of<int64_t>(key0 + j, keys - 1);
      row[j] = tile.k_row(key);
      next_k[j] = tile.next_k_row(key);
      next_v[j] = tile.v_row(key);
    });
    for (int d = 0; d < depth; d += V::kLanes) {
      V q_part[kRows];
      unroll<kRows>(FASTATTN_LAMBDA(r) { q_part[r] = V::load(q + r * depth + d); });
      unroll<kKeys>(FASTATTN_LAMBDA(j) {
        const V k_part = V::load_as(row[j] + d);
        if constexpr (kPrefetch) {
          __builtin_prefetch(next_k[j] + d, 0, 2);
          __builtin_prefetch(next_v[j] + d, 0, 2);
        }
        unroll<kRows>(FASTATTN_LAMBDA(r) { sums[r * kKeys + j] = fma(q_part[r], k_part, sums[r * kKeys + j]); });
      });
    }
    detail::transpose(sums);
    // Pairwise: a chain would add the lanes one after another.
    unroll<kPairs / 2>(FASTATTN_LAMBDA(i) { sums[i] = sums[i] + sums[i + kPairs / 2]; });
    V total = sums[0];
    unroll<kPairs / 2 - 1>(FASTATTN_LAMBDA(i) { total = total + sums[i + 1]; });
    T pairs[kPairs];
    total.store(pairs);
    unroll<kRows>(FASTATTN_LAMBDA(r) {
      for (int j = 0; j < kKeys; ++j) dots[r * kTileKeys + key0 + j] = pairs[r * kKeys + j];
    });
  }
}

template <typename T>
struct Workspace {
  T *q, *p, *out, *row_max, *row_sum;
  HeadScores<T>* scores;  // of each query head

  FASTATTN_INLINE int64_t take(ScratchCursor cursor, int64_t depth, int64_t columns) {
    q = cursor.take<T>(kMostRows * depth);
    p = cursor.take<T>(kMostRows * kTileKeys);
    out = cursor.take<T>(kMostRows * columns);
    row_max = cursor.take<T>(kMostRows);
    row_sum = cursor.take<T>(kMostRows * Vec<T>::kLanes);
    scores = cursor.take<HeadScores<T>>(kMostRows);
    return cursor.bytes();
  }
};

template <typename T, typename Element>
struct Decode {
  using V = Vec<T>;
  AttentionParams p;  // of the call, or of one of its sequences
  Dropout dropout;
  int64_t group, heads_per_task, parts, slices, slice_tiles;
  int depth, columns;
  // Each slice's unfinished rows: (batch, heads, most_queries, slices) x (columns, then largest and sum).
  int64_t most_queries;
  int64_t partial_elems;
  T* partials = nullptr;

  explicit Decode(const AttentionParams& params) : p(params) {
    dropout = make_dropout(p.dropout_p, p.rng_state);
    depth = static_cast<int>(p.head_dim);
    columns = static_cast<int>(p.head_dim_v);
    group = p.heads / p.heads_kv;
    heads_per_task = min_of<int64_t>(group, kMostRows / p.seqlen_q);
    parts = (group + heads_per_task - 1) / heads_per_task;
    const int64_t tiles = max_of<int64_t>(1, (p.seqlen_k + kTileKeys - 1) / kTileKeys);
    const int64_t wanted = (kWantedTasks + p.batch * p.heads_kv * parts - 1) / (p.batch * p.heads_kv * parts);
    slice_tiles = max_of((tiles + wanted - 1) / wanted, kShortestSlice / kTileKeys);
    slices = (tiles + slice_tiles - 1) / slice_tiles;
    partial_elems = columns + 2;
    most_queries = p.seqlen_q;
  }

  // The kernel of one batch entry. Of packed sequences, each has as many slices as the longest; the last may be empty.
  Decode entry(int64_t batch) const {
    Decode one = *this;
    narrow_to_entry(one.p, batch);
    return one;
  }

  void run() {
    Workspace<T> sizes;
    const Scratch scratch(max_threads(), sizes.take(ScratchCursor(nullptr), depth, columns));
    const int64_t rows = p.batch * p.heads * p.seqlen_q;
    const Scratch joined(1, slices > 1 ? rows * slices * partial_elems * static_cast<int64_t>(sizeof(T)) : 64);
    partials = reinterpret_cast<T*>(joined.piece(0));
    parallel_tasks(p.batch * p.heads_kv * parts * slices, [&](int64_t task, int thread) {
      Workspace<T> w;
      w.take(ScratchCursor(scratch.piece(thread)), depth, columns);
      const int64_t slice = task % slices, part = task / slices % parts, kv_head = task / slices / parts;
      entry(kv_head / p.heads_kv).run_slice(w, kv_head / p.heads_kv, kv_head % p.heads_kv, part, slice);
    });
    if (slices > 1) {
      parallel_ranges(rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t batch_head = row / most_queries;
          entry(batch_head / p.heads).join_slices(batch_head, row % most_queries);
        }
      });
    }
    if (is_packed(p)) finish_gaps<T>(p);
  }

  void run_slice(Workspace<T>& w, int64_t batch, int64_t kv_head, int64_t part, int64_t slice) {
    const int64_t head0 = kv_head * group + part * heads_per_task;
    const int heads = static_cast<int>(min_of(heads_per_task, (kv_head + 1) * group - head0));
    const int queries = static_cast<int>(p.seqlen_q), rows = heads * queries;
    for (int h = 0; h < heads; ++h) {
      w.scores[h] = make_head_scores<T>(p, batch, head0 + h);
      pack_rows(w.q + h * queries * depth, depth, head_of<const Element>(p.q, batch, head0 + h), p.q.stride_row,
                queries, depth, w.scores[h].dot_factor);
    }
    const IndexRange seen = make_band(p).keys_seen_by_any({0, p.seqlen_q});
    const int64_t tile_begin = max_of(slice * slice_tiles, seen.begin / kTileKeys);
    const int64_t tile_end = min_of((slice + 1) * slice_tiles, (seen.end + kTileKeys - 1) / kTileKeys);
    const CachedRows<Element> k(p, p.k, batch, kv_head), v(p, p.v, batch, kv_head);
    bool first = true;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      first = !visit_tile(w, k, v, batch, head0, rows, tile, first) && first;
    for (int row = 0; row < rows; ++row) {
      const int64_t head = head0 + row / queries, query = row % queries;
      RowStatistics statistics;
      if (!first) statistics = {w.row_max[row], V::load(w.row_sum + row * V::kLanes).reduce_add()};
      T* out = w.out + row * columns;
      if (slices == 1) {
        finish_row<T, Element>(p, batch, head, query, statistics, dropout.keep_scale, out);
      } else {
        T* partial = partials + (((batch * p.heads + head) * most_queries + query) * slices + slice) * partial_elems;
        for (int c = 0; c < columns && !first; ++c) partial[c] = out[c];
        partial[columns] = static_cast<T>(statistics.largest);
        partial[columns + 1] = static_cast<T>(statistics.sum);
      }
    }
  }

  // Returns whether any row saw a key of the tile.
  FASTATTN_INLINE bool visit_tile(Workspace<T>& w, const CachedRows<Element>& k, const CachedRows<Element>& v,
                                  int64_t batch, int64_t head0, int rows, int64_t tile, bool first) {
    const int64_t key0 = tile * kTileKeys;
    const int keys = static_cast<int>(min_of<int64_t>(kTileKeys, p.seqlen_k - key0));
    const int queries = static_cast<int>(p.seqlen_q);
    uint64_t visible[kMostRows], seen_by_any = 0;
    for (int row = 0; row < rows; row += queries) {
      const TileView view = w.scores[row / queries].view({0, queries}, key0, visible + row);
      for (int r = row; r < row + queries; ++r) {
        if (view != TileView::kPartial) visible[r] = view == TileView::kFull ? ~uint64_t{0} : 0;
        seen_by_any |= visible[r];
      }
    }
    if (seen_by_any == 0) return false;

    dot_tile_at(w, k, v, rows, key0, keys);
    for (int r = 0; r < rows; ++r) probabilities(w, batch, head0 + r / queries, r, key0, visible[r], first);

    for (int key = 0; key < keys;) {
      const int end = static_cast<int>(v.run_end(key0 + key, key0 + keys) - key0);
      add_values(w, rows, {key, end}, v.row(key0 + key), v.stride(), first && key == 0);
      key = end;
    }
    return true;
  }

  // Adds the values of some keys of the tile, the first of them at `values`, `stride` apart.
  FASTATTN_INLINE void add_values(Workspace<T> w, int rows, IndexRange keys, const Element* values, int64_t stride,
                                  bool first) {
    const int count = static_cast<int>(keys.end - keys.begin);
    w.p += keys.begin;
    int row = 0;
    for (; row + 4 <= rows; row += 4) accumulate_values<4>(block_at(w, row), values, stride, 0, count, first);
    for (; row + 2 <= rows; row += 2) accumulate_values<2>(block_at(w, row), values, stride, 0, count, first);
    if (row < rows) accumulate_values<1>(block_at(w, row), values, stride, 0, count, first);
  }

  FASTATTN_INLINE void dot_tile_at(Workspace<T>& w, const CachedRows<Element>& k, const CachedRows<Element>& v,
                                   int rows, int64_t key0, int keys) {
    // Nothing past the last key is asked for; where few or none follow, some of the tile's own again.
    const int64_t next = key0 + min_of<int64_t>(kTileKeys, max_of<int64_t>(p.seqlen_k - key0 - kTileKeys, 0));
    if (k.is_run(key0, keys) && k.is_run(next, keys)) {
      return dot_all_rows(w, rows, StridedTile<Element>{k.row(key0), v.row(key0), k.row(next), k.stride(), v.stride()},
                          keys);
    }
    ScatteredTile<Element> here;
    k.addresses(here.k, key0, keys);
    v.addresses(here.v, key0, keys);
    k.addresses(here.next_k, next, keys);
    dot_all_rows(w, rows, here, keys);
  }

  template <typename Tile>
  FASTATTN_INLINE void dot_all_rows(Workspace<T>& w, int rows, const Tile& here, int keys) {
    int row = 0;
    if constexpr (V::kLanes >= 4) {
      for (; row + 4 <= rows; row += 4) dot_rows<4>(w, row, here, keys);
    }
    for (; row + 2 <= rows; row += 2) dot_rows<2>(w, row, here, keys);
    if (row < rows) dot_rows<1>(w, row, here, keys);
  }

  template <int kRows, typename Tile>
  FASTATTN_INLINE void dot_rows(Workspace<T>& w, int row, const Tile& here, int keys) {
    T *dots = w.p + row * kTileKeys, *q = w.q + row * depth;
    if (row == 0) {
      dot_tile<kRows, true, Element>(dots, q, depth, here, keys);
    } else {
      dot_tile<kRows, false, Element>(dots, q, depth, here, keys);
    }
  }

  FASTATTN_INLINE RowBlock<T> block_at(Workspace<T>& w, int row) const {
    RowBlock<T> block = {};
    block.p = w.p + row * kTileKeys;
    block.row_max = w.row_max + row;
    block.row_sum = w.row_sum + row * V::kLanes;
    block.out = w.out + row * columns;
    block.ld_out = columns;
    return block;
  }

  // One row's dot products become probabilities, not yet divided by their sum.
  void probabilities(Workspace<T>& w, int64_t batch, int64_t head, int row, int64_t key0, uint64_t visible,
                     bool first) {
    constexpr int kVecs = kTileKeys / V::kLanes;
    const int64_t query = row % p.seqlen_q;
    const HeadScores<T>& scores = w.scores[row / p.seqlen_q];
    T* dots = w.p + row * kTileKeys;
    if (scores.softcap != 0) scores.cap(dots, kTileKeys, 1);
    scores.add_terms(dots, kTileKeys, query, 1, key0);
    V x[kVecs];
    unroll<kVecs>(FASTATTN_LAMBDA(v) { x[v] = V::load(dots + v * V::kLanes); });
    if (visible != ~uint64_t{0}) keep_lanes(x, visible, -std::numeric_limits<T>::infinity());
    softmax_step(x, block_at(w, row), 0, first);
    if (dropout.active()) {
      const uint32_t batch_head = static_cast<uint32_t>(batch * p.heads + head);
      keep_lanes(x, dropout.kept_columns(batch_head, static_cast<uint32_t>(query), key0), T(0));
    }
    unroll<kVecs>(FASTATTN_LAMBDA(v) { x[v].store(dots + v * V::kLanes); });
  }

  // The slices of one row, brought to the scale of the largest score.
  void join_slices(int64_t batch_head, int64_t query) const {
    if (query >= p.seqlen_q) return;
    T* partial = partials + (batch_head * most_queries + query) * slices * partial_elems;
    RowStatistics all;
    for (int64_t s = 0; s < slices; ++s) {
      const T* statistics = partial + s * partial_elems + columns;
      if (statistics[1] != 0) all.largest = max_of(all.largest, static_cast<double>(statistics[0]));
    }
    T out[256] = {};
    for (int64_t s = 0; s < slices; ++s) {
      const T* slice = partial + s * partial_elems;
      // A slice without visible keys has no output.
      if (slice[columns + 1] == 0) continue;
      const double factor = __builtin_exp(static_cast<double>(slice[columns]) - all.largest);
      all.sum += static_cast<double>(slice[columns + 1]) * factor;
      const V scale = V::set1(static_cast<T>(factor));
      for (int c = 0; c < columns; c += V::kLanes) fma(V::load(slice + c), scale, V::load(out + c)).store(out + c);
    }
    finish_row<T, Element>(p, batch_head / p.heads, batch_head % p.heads, query, all, dropout.keep_scale, out);
  }
};

}  // namespace

void attention_decode_cpu(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat64:
      return Decode<double, double>(p).run();
    case DType::kBFloat16:
      return Decode<float, BFloat16>(p).run();
    case DType::kFloat16:
      return Decode<float, Float16>(p).run();
    default:
      return Decode<float, float>(p).run();
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
