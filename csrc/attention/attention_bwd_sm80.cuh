// Backward attention for compute capability 8.0 and newer: what its kernels share. README.md derives the formulas.
//
//   attention_bwd_rows_sm80.cuh    delta = rowsum(dO o) - dlse and the lse in base 2; what rows alone make gradients of
//   attention_bwd_dkv_sm80.cuh     dk, dv:  a block owns keys and visits the queries    4 products of a tile
//   attention_bwd_dq_sm80.cuh      dq:      a block owns queries and visits the keys    3 products
//   attention_bwd_dmask_sm80.cuh   the gradient of a floating mask, where it is asked for    2 products
// On Hopper attention_bwd_sm90.cuh takes the place of the second and third.
//
// Every sum has one owner and one order, so that results are bitwise the same in every run, without atomics and
// without a copy of dq in fp32.
#pragma once

#include "attention/attention_bwd_scores.cuh"
#include "attention/attention_mask_tiles.cuh"
#include "attention/attention_packed.cuh"
#include "attention/attention_products_sm80.cuh"

namespace fastattn {

// Rows of the statistics below are padded to a multiple of this, the largest tile of queries.
constexpr int kRowPadding = 128;

// How many blocks share the queries of a block of keys, by query heads of the group and by query tiles, and where their
// sums of dk and dv lie: see attention_bwd_split_sm80.cuh.
struct BwdParts {
  int heads = 1, tiles = 1;
  int columns = 0;  // of a row of sums: head_dim of the wider gradient, a multiple of 8
  float* first = nullptr;
  int64_t elements = 0;  // of one part's sums of one gradient: (batch * heads_kv, seqlen_k, columns)

  FASTATTN_HOST_DEVICE int count() const { return heads * tiles; }
  FASTATTN_DEVICE float* sums(bool of_dv, int part) const { return first + ((of_dv ? count() : 0) + part) * elements; }
};

struct AttentionBwdArgs {
  ScoreArgs scores;
  AttentionTensor q, k, v, dout, dq, dk, dv;
  // See attention_bwd_rows_sm80.cuh; of a dense batch (batch * heads, padded_rows) each.
  const float* lse_log2 = nullptr;
  const float* delta = nullptr;
  // Of dS, by the kernel that owns queries: null where nobody asks. Each of its key parts has as many as there is
  // delta.
  float* row_sums = nullptr;
  int64_t row_sums_part = 0;
  int64_t padded_rows = 0;
  int heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  float scale = 0.0f;
  bool dq_is_aligned = false, dk_is_aligned = false, dv_is_aligned = false;
  int query_tiles = 0, key_tiles = 0;  // of the kernel that owns queries, and of the one that owns keys
  MaskTiles mask_tiles;                // of the kernel's own tiles
  BwdParts parts;
  PackedSequences packed;
};

// Statistics of packed sequences are (heads, packed_statistics_rows), in which the sequence that begins at row
// `first_query` has those from this one on: the first multiple of kRowPadding that leaves the sequences before it room
// for their own padding.
FASTATTN_HOST_DEVICE int64_t packed_statistics_row(int64_t batch, int64_t first_query) {
  return (first_query / kRowPadding + batch) * kRowPadding;
}
FASTATTN_HOST_DEVICE int64_t packed_statistics_rows(int64_t batch, int64_t total) {
  return packed_statistics_row(batch, total) + kRowPadding;
}

// Makes args those of batch entry `batch` alone.
FASTATTN_DEVICE void narrow_to_entry(AttentionBwdArgs& args, int batch) {
  const EntryRows first = narrow_to_entry(args.scores, args.packed, batch);
  for (AttentionTensor* tensor : {&args.q, &args.dout, &args.dq}) skip_rows(*tensor, first.query);
  for (AttentionTensor* tensor : {&args.k, &args.v, &args.dk, &args.dv}) skip_rows(*tensor, first.key);
  args.lse_log2 += packed_statistics_row(batch, first.query);
  args.delta += packed_statistics_row(batch, first.query);
  if (args.row_sums != nullptr) args.row_sums += packed_statistics_row(batch, first.query);
}

// Where the statistics of (batch, head) start.
template <bool kPacked>
FASTATTN_DEVICE int64_t statistics_offset(const AttentionBwdArgs& args, int batch, int head) {
  return (kPacked ? head : int64_t{batch} * args.heads + head) * args.padded_rows;
}

// First element of (batch, head).
template <typename Element>
FASTATTN_DEVICE Element* head_gmem(const AttentionTensor& tensor, int batch, int head) {
  return static_cast<Element*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head;
}

// Starts copies of rows [row, row + rows) of (entry, head) to a tile. `every` has the strides of `own`, in constant
// memory. Traits: Element, kThreads.
template <typename Traits, typename Tile>
FASTATTN_DEVICE void load_head_rows(Tile tile, const AttentionTensor& own, const AttentionTensor& every, int entry,
                                    int head, int row, int rows, int cols) {
  load_tile<Traits::kThreads>(tile,
                              head_gmem<const typename Traits::Element>(own, entry, head) + row * every.stride_row,
                              every.stride_row, rows, cols);
}

// Starts copies of lse, then delta, of the tile of queries from `query` on: 16 bytes a thread. Traits: kBlockQ,
// kPacked.
template <typename Traits>
FASTATTN_DEVICE void load_statistics(uint32_t statistics_smem, const AttentionBwdArgs& args,
                                     const AttentionBwdArgs& own, int batch, int head, int query) {
  constexpr int kVectors = Traits::kBlockQ / 4;
  const int i = static_cast<int>(threadIdx.x);
  if (i < 2 * kVectors) {
    const float* source = (i < kVectors ? own.lse_log2 : own.delta) +
                          statistics_offset<Traits::kPacked>(args, batch, head) + query + i % kVectors * 4;
    cp_async<16>(statistics_smem + 16 * i, source);
  }
}

// One row tile, 16 rows: dot products s = q k^T and dp = dO v^T become, in s, the gradient of the scores before the
// softcap (dX), or of what was added to them (dS, the gradient of a mask). lse is +inf for rows that do not exist. If
// it `sums`, adds this lane's share of the rows of dS to row_sums.
template <ScoreKind kKind, bool kOfMask, int kColTiles>
FASTATTN_DEVICE void make_score_gradients(float (&s)[kColTiles][4], float (&dp)[kColTiles][4], const ScoreArgs& scores,
                                          const DropoutState& dropout, const QueryRows& rows, int batch, int col0,
                                          bool is_masked, bool is_cut, const float (&lse)[2], const float (&delta)[2],
                                          bool sums, float (&row_sums)[2]) {
  constexpr bool kPlain = kKind == ScoreKind::kPlain;
  float x[1][kColTiles][4], gradient[1][kColTiles][4], derivative[1][kColTiles][4];
  for_each_score(x, [&](float& element, int, int half, int n, int e) { element = s[n][2 * half + e]; });
  for_each_score(gradient, [&](float& element, int, int half, int n, int e) { element = dp[n][2 * half + e]; });
  const bool has_derivative = !kPlain && !kOfMask && scores.softcap_log2 > 0.0f;
  if constexpr (!kPlain) {
    scale_scores<true>(x, scores);
    if (has_derivative) {
      for_each_score(derivative, [&](float& element, int, int half, int n, int e) {
        element = softcap_derivative(x[0][n][2 * half + e], scores);
      });
    }
    if (scores.alibi_slopes != nullptr) add_alibi(x, scores, rows, batch, col0);
    if (is_masked) apply_mask(x, scores, rows, batch, col0);
  }
  if (is_cut) hide_outside_band(x, scores, rows, col0);
  for_each_score(x, [&](float& element, int, int half, int, int) {
    element = ex2_approx(fmaf(element, kPlain ? scores.scale_log2 : 1.0f, -lse[half]));
  });
  if constexpr (!kPlain) {
    if (scores.dropout_threshold > 0) {
      for_each_dropout(gradient, scores, dropout, rows, batch, col0,
                       [&](float& element, bool keep, int, int, int, int) {
                         element = keep ? element * scores.dropout_scale : 0.0f;
                       });
    }
  }
  for_each_score(
      x, [&](float& element, int, int half, int n, int e) { element *= gradient[0][n][2 * half + e] - delta[half]; });
  if (sums) for_each_score(x, [&](float& element, int, int half, int, int) { row_sums[half] += element; });
  if constexpr (!kPlain) {
    if (has_derivative) {
      for_each_score(x,
                     [&](float& element, int, int half, int n, int e) { element *= derivative[0][n][2 * half + e]; });
    }
  }
  for_each_score(x, [&](float& element, int, int half, int n, int e) { s[n][2 * half + e] = element; });
}

// Walks the query tiles that see a block of keys, for one head of the group after another, or `part` of them. Traits:
// kNoMask, kBlockQ.
template <typename Traits>
struct QueryTileWalk {
  static constexpr bool kNoMask = Traits::kNoMask;
  const AttentionBwdArgs& args;
  int batch, key_tile, begin, end, head, end_head;
  MaskTileReader<kNoMask> reader;
  int tile;

  FASTATTN_DEVICE QueryTileWalk(const AttentionBwdArgs& args_, int batch_, int head_kv, int key_tile_, IndexRange keys,
                                const BwdParts& parts = {}, int part = 0)
      : args(args_),
        batch(batch_),
        key_tile(key_tile_),
        head(head_kv * (args_.heads / args_.heads_kv)),
        end_head(head + args_.heads / args_.heads_kv),
        reader(MaskTiles{}, 0, 0, 0, 0) {
    const IndexRange rows = band_of(args.scores).rows_that_see(keys);
    begin = static_cast<int>(rows.begin) / Traits::kBlockQ;
    end = rows.end > rows.begin ? (static_cast<int>(rows.end) + Traits::kBlockQ - 1) / Traits::kBlockQ : begin;
    if (parts.count() > 1) {
      const int group = end_head - head, head_part = part / parts.tiles, tile_part = part % parts.tiles;
      end_head = head + group * (head_part + 1) / parts.heads;
      head += group * head_part / parts.heads;
      const int tiles = end - begin;
      end = begin + tiles * (tile_part + 1) / parts.tiles;
      begin += tiles * tile_part / parts.tiles;
    }
    start_head();
    find();
  }
  FASTATTN_DEVICE bool done() const { return head >= end_head; }
  FASTATTN_DEVICE bool is_partial() const { return reader.is_partial(tile); }
  FASTATTN_DEVICE void advance() {
    ++tile;
    find();
  }

 private:
  FASTATTN_DEVICE void start_head() {
    reader = MaskTileReader<kNoMask>::down_column(args.mask_tiles, batch, head, key_tile, end);
    tile = begin;
  }
  FASTATTN_DEVICE void find() {
    tile = reader.next(tile);
    while (tile >= end && ++head < end_head) {
      start_head();
      tile = reader.next(tile);
    }
  }
};

}  // namespace fastattn
