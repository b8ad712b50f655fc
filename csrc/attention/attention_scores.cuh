// From dot products to scores and from probabilities to kept probabilities, on mma accumulators; shared by the CUDA
// kernels of attention. Scores are kept in base 2: x = log2(e) * s, so that the softmax needs exp2 alone.
//
// A warp's scores are float s[kRowTiles][kColTiles][4]. Its lane (g = lane / 4, t = lane % 4) holds
//   s[m][n][2 * half + e]   row first + 16 m + 8 half,   column col0 + 8 n + 2 t + e,
// where `first`, in QueryRows, already contains g.
#pragma once

#include "attention/attention.h"
#include "attention/mask.h"
#include "common/philox.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace fastattn {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// What a kernel is compiled for, so that a plain call carries no code, and no registers, of the others.
enum class ScoreKind : int {
  kPlain,       // scale > 0, causal diagonal and window
  kMask,        // and attn_mask
  kEverything,  // and ALiBi, softcap, dropout, any scale
};

// What a kernel needs to know to make scores; filled on the host.
struct ScoreArgs {
  int seqlen_q = 0, seqlen_k = 0, heads = 0;
  float scale_log2 = 0.0f;     // scale * log2(e)
  float softcap_log2 = 0.0f;   // softcap * log2(e); 0 = off
  float softcap_scale = 0.0f;  // scale / softcap
  float inverse_softcap_log2 = 0.0f;
  int diagonal = 0, window_left = 0, window_right = 0;
  const float* alibi_slopes = nullptr;
  int64_t stride_alibi_batch = 0;
  AttentionMask mask;
  bool mask_pairs = false;  // columns (2 i, 2 i + 1) of the mask can be read in one access
  float dropout_scale = 1.0f;
  uint32_t dropout_threshold = 0;  // 0 = off
  const int64_t* rng_state = nullptr;
};

FASTATTN_DEVICE Band band_of(const ScoreArgs& scores) {
  return {scores.seqlen_q, scores.seqlen_k, scores.diagonal, scores.window_left, scores.window_right};
}

// Whether every row can be read or written 16 bytes at a time, up to its last element.
inline bool rows_are_aligned(const AttentionTensor& tensor, int64_t head_dim) {
  return reinterpret_cast<uint64_t>(tensor.data) % 16 == 0 && tensor.stride_batch % 8 == 0 &&
         tensor.stride_head % 8 == 0 && tensor.stride_row % 8 == 0 && head_dim % 8 == 0;
}

// The least that a kernel has to be compiled for to serve a call.
inline ScoreKind score_kind(const AttentionParams& p) {
  const bool everything = p.softcap > 0.0 || p.alibi_slopes != nullptr || p.dropout_p > 0.0 || !(p.scale > 0.0);
  return everything ? ScoreKind::kEverything : p.mask.data != nullptr ? ScoreKind::kMask : ScoreKind::kPlain;
}

inline int64_t mask_element_bytes(DType dtype) { return dtype == DType::kBool ? 1 : dtype == DType::kFloat32 ? 4 : 2; }

// Null, or why the kernels cannot take these parameters.
inline const char* make_score_args(ScoreArgs& args, const AttentionParams& p) {
  if (p.seqlen_q > kMaxCudaSeqlen || p.seqlen_k > kMaxCudaSeqlen) return "a sequence is longer than 2**28";
  args.seqlen_q = static_cast<int>(p.seqlen_q);
  args.seqlen_k = static_cast<int>(p.seqlen_k);
  args.heads = static_cast<int>(p.heads);
  constexpr double kLog2EDouble = 1.4426950408889634;
  args.scale_log2 = static_cast<float>(p.scale * kLog2EDouble);
  if (p.softcap > 0.0) {
    args.softcap_log2 = static_cast<float>(p.softcap * kLog2EDouble);
    args.softcap_scale = static_cast<float>(p.scale / p.softcap);
    args.inverse_softcap_log2 = static_cast<float>(1.0 / (p.softcap * kLog2EDouble));
  }
  // A window as wide as both sequences hides nothing.
  const int64_t limit = p.seqlen_q + p.seqlen_k;
  const auto window = [limit](int64_t keys) {
    return static_cast<int>(keys > limit ? limit : keys < -limit ? -limit : keys);
  };
  args.diagonal = static_cast<int>(p.diagonal);
  args.window_left = window(p.window_left);
  args.window_right = window(p.window_right);
  args.alibi_slopes = p.alibi_slopes;
  args.stride_alibi_batch = p.stride_alibi_batch;
  args.mask = p.mask;
  const uint64_t pair_bytes = static_cast<uint64_t>(2 * mask_element_bytes(p.mask.dtype));
  args.mask_pairs = p.mask.stride_k == 1 && p.seqlen_k % 2 == 0 && p.mask.stride_q % 2 == 0 &&
                    p.mask.stride_head % 2 == 0 && p.mask.stride_batch % 2 == 0 &&
                    reinterpret_cast<uint64_t>(p.mask.data) % pair_bytes == 0;
  if (p.dropout_p > 0.0) {
    args.dropout_threshold = dropout_threshold(p.dropout_p);
    args.dropout_scale = p.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 0.0f;
    args.rng_state = p.rng_state;
  }
  return nullptr;
}

// A little more than 2^32 / group, never 0: multiplying by it divides rows below 2^32 / group exactly, for a power of
// two.
inline uint32_t inverse_of_group(int group) {
  return static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint32_t>(group)) | 1;
}

// Which query and head a row of a tile is. Without packing, row r is query r of one head; with `group` heads packed
// into a tile, it is query r / group of head r % group of the group.
struct QueryRows {
  int first = 0;  // this lane's first row
  int head = 0;   // of row 0
  int group = 1;
  uint32_t group_inverse = 0;  // 0: divisions instead, which some kernels have the registers for, and others need

  FASTATTN_DEVICE int row(int m, int half) const { return first + 16 * m + 8 * half; }
  FASTATTN_DEVICE int query_of(int row) const {
    if (group == 1) return row;
    if (group_inverse == 0) return row / group;
    return static_cast<int>(uint64_t{static_cast<uint32_t>(row)} * group_inverse >> 32);
  }
  FASTATTN_DEVICE int head_in_group(int row) const {
    if (group == 1) return 0;
    return group_inverse == 0 ? row % group : row - query_of(row) * group;
  }
  FASTATTN_DEVICE int head_of(int row) const { return group == 1 ? head : head + head_in_group(row); }
};

FASTATTN_DEVICE int lane_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

// Calls fn(element, m, half, n, e) for every score of this lane: `element` is s[m][n][2 * half + e].
template <int kRowTiles, int kColTiles, typename Fn>
FASTATTN_DEVICE void for_each_score(float (&s)[kRowTiles][kColTiles][4], Fn fn) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fn(s[m][n][i], m, i / 2, n, i % 2);
    }
  }
}

// ---- scale and softcap

// tanh to about 2^-22, unlike tanh.approx with its 2^-11: a softcap multiplies the error.
FASTATTN_DEVICE float tanh_exact(float x) {
  // Near 0, 1 - 2 / (1 + e^2x) cancels; the series is exact to 2^-29 of x there.
  const float square = x * x;
  const float series = fmaf(x * square, fmaf(square, fmaf(square, -17.0f / 315.0f, 2.0f / 15.0f), -1.0f / 3.0f), x);
  const float quotient = fmaf(-2.0f, rcp_approx(1.0f + ex2_approx(2.0f * kLog2E * x)), 1.0f);
  return fabsf(x) < 0.125f ? series : quotient;
}

// Dot products become base-2 scores.
template <bool kSoftcap, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void scale_scores(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args) {
  if (kSoftcap && args.softcap_log2 > 0.0f) {
    for_each_score(s,
                   [&](float& x, int, int, int, int) { x = args.softcap_log2 * tanh_exact(x * args.softcap_scale); });
  } else {
    for_each_score(s, [&](float& x, int, int, int, int) { x *= args.scale_log2; });
  }
}

// ---- ALiBi, masks, band

template <int kRowTiles, int kColTiles>
FASTATTN_DEVICE void add_alibi(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args, const QueryRows& rows,
                               int batch, int col0) {
  const float* slopes = args.alibi_slopes + batch * args.stride_alibi_batch;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = rows.row(m, half);
      const float slope = slopes[rows.head_of(row)] * kLog2E;
      const float distance0 = static_cast<float>(rows.query_of(row) + args.diagonal - col0 - lane_column());
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[m][n][2 * half + e];
          x = fmaf(-slope, fabsf(distance0 - static_cast<float>(8 * n + e)), x);
        }
      }
    }
  }
}

// Stored as a byte; 1 = attend.
struct BoolMaskElement {
  uint8_t attend;
};

FASTATTN_DEVICE void apply_mask_element(float& x, BoolMaskElement element) { x = element.attend ? x : -INFINITY; }
template <typename Element>
FASTATTN_DEVICE void apply_mask_element(float& x, Element element) {
  // The lowest finite numbers are often written for -inf, but a row that has nothing else attends to all keys equally:
  // in base 2 they must not become -inf.
  constexpr float kLowest = -2.35e38f;
  const float added = to_float(element);
  x = added == -INFINITY ? -INFINITY : fmaf(fmaxf(added, kLowest), kLog2E, x);
}

template <typename Element, bool kPairs, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void apply_mask_elements(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args,
                                         const QueryRows& rows, int batch, int col0) {
  const AttentionMask& mask = args.mask;
  const int lane_col = col0 + lane_column();
  const Element* mask_gmem =
      static_cast<const Element*>(mask.data) + batch * mask.stride_batch + lane_col * mask.stride_k;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past the last query are computed and never stored; they read the last query's mask.
      const int row = rows.row(m, half), query = min(rows.query_of(row), args.seqlen_q - 1);
      const Element* row_gmem = mask_gmem + rows.head_of(row) * mask.stride_head + query * mask.stride_q;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        if constexpr (kPairs) {
          if (lane_col + 8 * n < args.seqlen_k) {
            const Vec<Element, 2> pair = load_vec<2>(row_gmem + 8 * n);
            apply_mask_element(s[m][n][2 * half], pair[0]);
            apply_mask_element(s[m][n][2 * half + 1], pair[1]);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (lane_col + 8 * n + e < args.seqlen_k) {
              apply_mask_element(s[m][n][2 * half + e], row_gmem[(8 * n + e) * mask.stride_k]);
            }
          }
        }
      }
    }
  }
}

template <typename Element, int kRowTiles, int kColTiles>
FASTATTN_DEVICE void apply_mask_of(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args, const QueryRows& rows,
                                   int batch, int col0) {
  if (args.mask_pairs) {
    apply_mask_elements<Element, true>(s, args, rows, batch, col0);
  } else {
    apply_mask_elements<Element, false>(s, args, rows, batch, col0);
  }
}

// attn_mask, whatever its dtype. Columns past seqlen_k are not read; hide_outside_band sees to them.
template <int kRowTiles, int kColTiles>
FASTATTN_DEVICE void apply_mask(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args, const QueryRows& rows,
                                int batch, int col0) {
  switch (args.mask.dtype) {
    case DType::kBool:
      return apply_mask_of<BoolMaskElement>(s, args, rows, batch, col0);
    case DType::kFloat32:
      return apply_mask_of<float>(s, args, rows, batch, col0);
    case DType::kBFloat16:
      return apply_mask_of<bfloat16_t>(s, args, rows, batch, col0);
    default:
      return apply_mask_of<half_t>(s, args, rows, batch, col0);
  }
}

// Causal diagonal, window, and the end of the keys: -inf outside of them.
template <int kRowTiles, int kColTiles>
FASTATTN_DEVICE void hide_outside_band(float (&s)[kRowTiles][kColTiles][4], const ScoreArgs& args,
                                       const QueryRows& rows, int col0) {
  const int lane_col = col0 + lane_column();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = rows.query_of(rows.row(m, half)) + args.diagonal;
      // Relative to the lane's first column, so that the columns below are constants.
      const int first = position - args.window_left - lane_col;
      const int last = min(position + args.window_right, args.seqlen_k - 1) - lane_col;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * n + e < first || 8 * n + e > last) s[m][n][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// ---- dropout

struct DropoutState {
  uint32_t seed_low = 0, seed_high = 0, offset = 0;
};

// Nothing is read where nothing is dropped; there is no generator's state then.
FASTATTN_DEVICE DropoutState load_dropout_state(const ScoreArgs& scores) {
  DropoutState state;
  if (scores.dropout_threshold > 0) {
    const uint64_t seed = static_cast<uint64_t>(scores.rng_state[0]);
    state = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
             static_cast<uint32_t>(scores.rng_state[1])};
  }
  return state;
}

// Calls fn(element, keep, m, half, n, e) for every probability of this lane. col0 is a multiple of 32: then one draw
// serves eight of a row's elements; or of 16, for kColTiles = 2, and it serves four.
template <int kRowTiles, int kColTiles, typename Fn>
FASTATTN_DEVICE void for_each_dropout(float (&p)[kRowTiles][kColTiles][4], const ScoreArgs& args,
                                      const DropoutState& state, const QueryRows& rows, int batch, int col0, Fn fn) {
  static_assert(kColTiles % 4 == 0 || kColTiles == 2, "a draw of Philox serves 32 columns");
  constexpr int kWords = kColTiles == 2 ? 2 : 4;
  const bool upper = kColTiles == 2 && (col0 & 16) != 0;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = rows.row(m, half);
      const uint32_t query = static_cast<uint32_t>(rows.query_of(row));
      const uint32_t batch_head = static_cast<uint32_t>(batch * args.heads + rows.head_of(row));
#pragma unroll
      for (int n = 0; n < kColTiles; n += 4) {
        const uint32_t group = dropout_group(col0 + 8 * n + lane_column());
        const PhiloxState draw =
            philox_4x32_10({{group, query, batch_head, state.offset}}, state.seed_low, state.seed_high);
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          const uint32_t bits = upper ? draw.word[word + 4 - kWords] : draw.word[word];
          fn(p[m][n + word][2 * half], (bits & 0xFFFFu) >= args.dropout_threshold, m, half, n + word, 0);
          fn(p[m][n + word][2 * half + 1], (bits >> 16) >= args.dropout_threshold, m, half, n + word, 1);
        }
      }
    }
  }
}

// Dropped probabilities become 0; the others are not scaled: the kernel does that once, at the end.
template <int kRowTiles, int kColTiles>
FASTATTN_DEVICE void drop_probabilities(float (&p)[kRowTiles][kColTiles][4], const ScoreArgs& args,
                                        const DropoutState& state, const QueryRows& rows, int batch, int col0) {
  for_each_dropout(p, args, state, rows, batch, col0,
                   [](float& element, bool keep, int, int, int, int) { element = keep ? element : 0.0f; });
}

}  // namespace fastattn
