// The softmax of rows that arrive tile by tile, on mma accumulators (their layout is in attention_scores.cuh).
// Source: Milakov and Gimelshein, arXiv:1805.02867; scores are in base 2, so that exp2 is all there is.
#pragma once

#include "attention/attention_scores.cuh"
#include "common/reduce.cuh"

namespace fastattn {

template <int kRowTiles>
struct OnlineSoftmax {
  // What exponents are taken relative to: near the largest score so far, but not always the largest. It is raised only
  // when a score exceeds it by 2^kSlack, since any reference cancels in the end, and raising it costs a multiplication
  // of the whole output tile. Probabilities stay below 2^kSlack, which fp16 holds as precisely as it does 1.
  static constexpr float kSlack = 8.0f;
  // The reference of a row that has seen nothing; finite, so that exp2(-inf - reference) is 0 there too.
  static constexpr float kNothing = -3.4028234663852886e38f;
  float reference[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's columns

  // A sink is a logit that is there from the start: -inf for none.
  FASTATTN_DEVICE void start(int m, int half, float sink_log2) {
    reference[m][half] = fmaxf(sink_log2, kNothing);
    sum[m][half] = sink_log2 > -INFINITY && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
  }

  // First half of a step: raises the references to a tile's scores, times `factor` > 0. True if what was summed before
  // must be multiplied by `correction`; it is 1 in all rows of the warp otherwise.
  template <int kColTiles>
  FASTATTN_DEVICE bool raise(const float (&s)[kRowTiles][kColTiles][4], float factor,
                             float (&correction)[kRowTiles][2]) {
    bool any_raised = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kColTiles; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        largest = warp_reduce<4>(largest, Max()) * factor;
        const float before = reference[m][half];
        const bool raised = largest > before + kSlack;
        correction[m][half] = raised ? ex2_approx(before - largest) : 1.0f;
        if (raised) reference[m][half] = largest;
        sum[m][half] *= correction[m][half];
        any_raised |= raised;
      }
    }
    return __any_sync(kFullWarp, any_raised);
  }

  // Second half: scores become probabilities relative to the references. The factor costs nothing, as part of the
  // subtraction.
  template <int kColTiles>
  FASTATTN_DEVICE void exponentiate(float (&s)[kRowTiles][kColTiles][4], float factor) {
    for_each_score(s, [&](float& x, int m, int half, int, int) {
      x = ex2_approx(fmaf(x, factor, -reference[m][half]));
      sum[m][half] += x;
    });
  }

  // After the last tile: the whole row's sum, and the log-sum-exp in base 2 (-inf for a row that saw nothing). Not by
  // lg2_approx, whose error is more than the rounding of the result; once a row, log2f costs nothing.
  FASTATTN_DEVICE float total(int m, int half) const { return warp_reduce<4>(sum[m][half], Sum()); }
  FASTATTN_DEVICE float lse_log2(int m, int half, float row_total) const {
    return reference[m][half] + log2f(row_total);
  }
};

}  // namespace fastattn
