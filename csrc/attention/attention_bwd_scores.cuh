// Scores on transposed accumulators: rows are keys, columns are queries. That way round, P^T and dS^T lie in registers
// as the product with dO and q wants them (attention_bwd_dkv_sm80.cuh). What the functions do is described in
// attention_scores.cuh, whose arguments they share; each works on one column tile, eight queries, so that little is
// alive at a time.
#pragma once

#include "attention/attention_scores.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace fastattn {

// A lane (g = lane / 4, t = lane % 4) holds x[m][0][2 * half + e]: key first_key + 16 m + 8 half, query
// first_query + e, where first_key contains g and first_query contains 2 t.
struct TransposedPlace {
  int first_key = 0, first_query = 0, batch = 0, head = 0;
};

// Calls fn(element, m, half, e) for every element of a column tile.
template <int kRowTiles, typename Fn>
FASTATTN_DEVICE void for_each_transposed(float (&x)[kRowTiles][1][4], Fn fn) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fn(x[m][0][i], m, i / 2, i % 2);
  }
}

template <int kRowTiles>
FASTATTN_DEVICE void add_alibi_transposed(float (&x)[kRowTiles][1][4], const ScoreArgs& args,
                                          const TransposedPlace& place) {
  const float slope = args.alibi_slopes[place.batch * args.stride_alibi_batch + place.head] * kLog2E;
  const float distance0 = static_cast<float>(place.first_query + args.diagonal - place.first_key);
  for_each_transposed(x, [&](float& element, int m, int half, int e) {
    element = fmaf(-slope, fabsf(distance0 + static_cast<float>(e - 16 * m - 8 * half)), element);
  });
}

template <typename Element, int kRowTiles>
FASTATTN_DEVICE void apply_mask_elements_transposed(float (&x)[kRowTiles][1][4], const ScoreArgs& args,
                                                    const TransposedPlace& place) {
  const AttentionMask& mask = args.mask;
  const Element* mask_gmem =
      static_cast<const Element*>(mask.data) + place.batch * mask.stride_batch + place.head * mask.stride_head;
  for_each_transposed(x, [&](float& element, int m, int half, int e) {
    // What lies outside the scores is computed and never stored; it reads the last query's or key's mask.
    const int query = min(place.first_query + e, args.seqlen_q - 1);
    const int key = min(place.first_key + 16 * m + 8 * half, args.seqlen_k - 1);
    apply_mask_element(element, mask_gmem[query * mask.stride_q + key * mask.stride_k]);
  });
}

template <int kRowTiles>
FASTATTN_DEVICE void apply_mask_transposed(float (&x)[kRowTiles][1][4], const ScoreArgs& args,
                                           const TransposedPlace& place) {
  switch (args.mask.dtype) {
    case DType::kBool:
      return apply_mask_elements_transposed<BoolMaskElement>(x, args, place);
    case DType::kFloat32:
      return apply_mask_elements_transposed<float>(x, args, place);
    case DType::kBFloat16:
      return apply_mask_elements_transposed<bfloat16_t>(x, args, place);
    default:
      return apply_mask_elements_transposed<half_t>(x, args, place);
  }
}

// Keys past the end are hidden only where asked: where a key's gradients are rows of their own, nobody stores those.
template <bool kHidePastEnd, int kRowTiles>
FASTATTN_DEVICE void hide_outside_band_transposed(float (&x)[kRowTiles][1][4], const ScoreArgs& args,
                                                  const TransposedPlace& place) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int position = place.first_query + e + args.diagonal;
    const int first = position - args.window_left - place.first_key;
    const int last_seen = position + args.window_right;
    const int last = (kHidePastEnd ? min(last_seen, args.seqlen_k - 1) : last_seen) - place.first_key;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (16 * m + 8 * half < first || 16 * m + 8 * half > last) x[m][0][2 * half + e] = -INFINITY;
      }
    }
  }
}

// Bit 4 m + 2 half + e: whether dropout keeps that element. A draw of Philox serves keys g / 2 * 2 + {0, 1} + {0, 8,
// 16, 24} of a query, which lanes g and g ^ 1 hold half each: the one of even g draws for query e = 0, the other for
// e = 1, and they exchange. first_key - g is a multiple of 16 kRowTiles.
template <int kRowTiles>
FASTATTN_DEVICE uint32_t kept_transposed(const ScoreArgs& args, const DropoutState& state,
                                         const TransposedPlace& place) {
  static_assert(kRowTiles == 1 || kRowTiles == 2, "a draw of Philox serves 32 keys");
  const bool odd = (place.first_key & 1) != 0;
  const PhiloxState draw =
      philox_4x32_10({{dropout_group(place.first_key), static_cast<uint32_t>(place.first_query + (odd ? 1 : 0)),
                       static_cast<uint32_t>(place.batch * args.heads + place.head), state.offset}},
                     state.seed_low, state.seed_high);
  const bool upper = kRowTiles == 1 && (place.first_key & 16) != 0;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const uint32_t drawn = upper ? draw.word[i + 4 - 2 * kRowTiles] : draw.word[i];
    const uint32_t received = __shfl_xor_sync(kFullWarp, drawn, 4);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t word = (e == 1) == odd ? drawn : received;
      const uint32_t bits = odd ? word >> 16 : word & 0xFFFFu;
      kept |= (bits >= args.dropout_threshold ? 1u : 0u) << (2 * i + e);
    }
  }
  return kept;
}

// d (capped score) / d (score), from the capped score in base 2: 1 - tanh^2.
FASTATTN_DEVICE float softcap_derivative(float capped_log2, const ScoreArgs& args) {
  const float tanh = capped_log2 * args.inverse_softcap_log2;
  return fmaf(-tanh, tanh, 1.0f);
}

}  // namespace fastattn
