// Attention weights on the CPU: exp(score - lse) after dropout, for those who want to see them. lse comes from the
// forward, so there is no second softmax.
// Work:    a task is one tile of one (batch, head), or of one batch with average_heads: it adds up the heads in order.
// Numbers: fp32 (fp64 for fp64 inputs) until the result is stored.
#include "attention/attention.h"
#include "attention/attention_pack_cpu.h"
#include "attention/attention_probs_cpu.h"
#include "common/dropout_cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int kTileElements = kTileQueries * kTileKeys;

template <typename T>
struct WeightsArrays {
  T *q, *k_t, *p, *sum;
};

template <typename T>
FASTATTN_INLINE WeightsArrays<T> take_arrays(ScratchCursor& cursor, const AttentionWeightsParams& p) {
  return {cursor.take<T>(kTileQueries * whole_vectors<T>(p.head_dim)), cursor.take<T>(kTileKeys * p.head_dim),
          cursor.take<T>(kTileElements), cursor.take<T>(p.average_heads ? kTileElements : 0)};
}

// The weights of one tile into arrays.p, all of it; false if they are all 0.
template <typename T, typename Element>
bool compute_tile(const AttentionWeightsParams& p, const WeightsArrays<T>& arrays, const Dropout& dropout,
                  int64_t batch, int64_t head, TilePlace place) {
  const HeadScores<T> scores = make_head_scores<T>(p, batch, head);
  uint64_t visible[kTileQueries], kept[kTileQueries];
  const TileView view = scores.view({place.row0, place.row0 + place.rows}, place.key0, visible);
  if (view == TileView::kHidden) return false;

  const auto rows_at = [](const AttentionTensor& tensor, int64_t b, int64_t h, int64_t row) {
    return static_cast<const Element*>(tensor.data) + b * tensor.stride_batch + h * tensor.stride_head +
           row * tensor.stride_row;
  };
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t width = whole_vectors<T>(p.head_dim);
  pack_rows<T>(arrays.q, width, rows_at(p.q, batch, head, place.row0), p.q.stride_row, place.rows, head_dim);
  pack_keys(arrays.k_t, rows_at(p.k, batch, head / (p.heads / p.heads_kv), place.key0), p.k.stride_row, place.keys,
            head_dim);
  const int64_t batch_head = batch * p.heads + head;
  T lse[kTileQueries];
  for (int r = 0; r < place.rows; ++r) {
    const T row_lse = static_cast<const T*>(p.lse)[batch_head * p.seqlen_q + place.row0 + r];
    // A row that sees nothing has weights of 0.
    lse[r] = row_lse == -static_cast<T>(__builtin_inf()) ? static_cast<T>(__builtin_inf()) : row_lse;
  }

  StripLimits limits;
  limits.set_all(head_dim, kTileKeys);
  if (view == TileView::kPartial) {
    place.visible = visible;
    recompute_probabilities<T, true, T>(arrays.p, nullptr, scores, {arrays.q, width}, arrays.k_t, lse, place, limits);
  } else {
    recompute_probabilities<T, false, T>(arrays.p, nullptr, scores, {arrays.q, width}, arrays.k_t, lse, place, limits);
  }
  if (dropout.active()) {
    for (int r = 0; r < place.rows; ++r) {
      kept[r] =
          dropout.kept_columns(static_cast<uint32_t>(batch_head), static_cast<uint32_t>(place.row0 + r), place.key0);
    }
    place.kept = kept;
    drop(arrays.p, arrays.p, static_cast<T>(dropout.keep_scale), place);
  }
  return true;
}

// dst = factor * src, or 0 without src.
template <typename T, typename Element>
void store_tile(Element* dst, int64_t stride, const T* src, T factor, const TilePlace& place) {
  using V = Vec<T>;
  for (int r = 0; r < place.rows; ++r) {
    for (int key = 0; key < place.keys; key += V::kLanes) {
      const V x = src ? V::load(src + r * kTileKeys + key) * V::set1(factor) : V::zero();
      x.store_as_partial(dst + r * stride + key, place.keys - key);
    }
  }
}

template <typename T, typename Element>
void run(const AttentionWeightsParams& p) {
  const Dropout dropout = make_dropout(p.dropout_p, p.rng_state);
  const int64_t query_blocks = (p.seqlen_q + kTileQueries - 1) / kTileQueries;
  const int64_t key_tiles = (p.seqlen_k + kTileKeys - 1) / kTileKeys;
  const int64_t heads_apart = p.average_heads ? 1 : p.heads, heads_summed = p.average_heads ? p.heads : 1;
  ScratchCursor size(nullptr);
  take_arrays<T>(size, p);
  Scratch scratch(max_threads(), size.bytes());

  parallel_tasks(p.batch * heads_apart * query_blocks * key_tiles, [&](int64_t task, int thread) {
    ScratchCursor cursor(scratch.piece(thread));
    const WeightsArrays<T> arrays = take_arrays<T>(cursor, p);
    const int64_t slice = task / key_tiles / query_blocks, batch = slice / heads_apart;
    TilePlace place{};
    place.key0 = task % key_tiles * kTileKeys;
    place.row0 = task / key_tiles % query_blocks * kTileQueries;
    place.rows = static_cast<int>(min_of<int64_t>(kTileQueries, p.seqlen_q - place.row0));
    place.keys = static_cast<int>(min_of<int64_t>(kTileKeys, p.seqlen_k - place.key0));

    const T* result = nullptr;
    for (int64_t i = 0; i < heads_summed; ++i) {
      const int64_t head = p.average_heads ? i : slice % heads_apart;
      if (!compute_tile<T, Element>(p, arrays, dropout, batch, head, place)) continue;
      if (!p.average_heads) {
        result = arrays.p;
        continue;
      }
      using V = Vec<T>;
      for (int at = 0; at < place.rows * kTileKeys; at += V::kLanes) {
        const V x = V::load(arrays.p + at);
        (result ? x + V::load(arrays.sum + at) : x).store(arrays.sum + at);
      }
      result = arrays.sum;
    }
    const T factor = p.average_heads ? T(1) / static_cast<T>(p.heads) : T(1);
    store_tile(static_cast<Element*>(p.weights) + (slice * p.seqlen_q + place.row0) * p.seqlen_k + place.key0,
               p.seqlen_k, result, factor, place);
  });
}

}  // namespace

void attention_weights_cpu(const AttentionWeightsParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return run<float, BFloat16>(p);
    case DType::kFloat16:
      return run<float, Float16>(p);
    case DType::kFloat64:
      return run<double, double>(p);
    default:
      return run<float, float>(p);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
