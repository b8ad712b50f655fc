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
  float reference[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's columns

  // A sink is a logit that is there from the start: -inf for none.
  FASTATTN_DEVICE void start(int m, int half, float sink_log2) {
    reference[m][half] = sink_log2;
    sum[m][half] = sink_log2 > -INFINITY && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
  }

  // Scores, times `factor` > 0 (which costs nothing: it becomes part of the subtraction), become probabilities
  // relative to the reference. What was summed before must be multiplied by `correction`; false if that is 1 in all
  // rows of the warp.
  template <int kColTiles>
  FASTATTN_DEVICE bool update(float (&s)[kRowTiles][kColTiles][4], float factor, float (&correction)[kRowTiles][2]) {
    bool any_raised = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        largest = warp_reduce<4>(largest, Max()) * factor;

        const float before = reference[m][half];
        const bool raised = largest > before + kSlack;
        if (raised) reference[m][half] = largest;
        correction[m][half] = raised ? ex2_approx(before - largest) : 1.0f;
        any_raised |= raised;

        // A row that has seen nothing yet: -inf - 0 instead of -inf - -inf.
        const float subtrahend = reference[m][half] == -INFINITY ? 0.0f : reference[m][half];
        float row_sum = sum[m][half] * correction[m][half];
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][n][2 * half + e];
            x = ex2_approx(fmaf(x, factor, -subtrahend));
            row_sum += x;
          }
        }
        sum[m][half] = row_sum;
      }
    }
    return __any_sync(kFullWarp, any_raised);
  }

  // After the last tile: the whole row's sum, and the log-sum-exp in base 2 (-inf for a row that saw nothing).
  FASTATTN_DEVICE float total(int m, int half) const { return warp_reduce<4>(sum[m][half], Sum()); }
  FASTATTN_DEVICE float lse_log2(int m, int half, float row_total) const {
    return reference[m][half] + lg2_approx(row_total);
  }
};

}  // namespace fastattn
