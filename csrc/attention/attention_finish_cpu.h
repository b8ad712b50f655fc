// The end of forward attention's running softmax: sink, division, log-sum-exp, and the row written out.
#pragma once

#include <limits>

#include "attention/attention.h"
#include "attention/attention_pack_cpu.h"
#include "attention/packed.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A finished pass over some keys: sum is of e^(score - largest), and the row's output is scaled alike.
struct RowStatistics {
  double largest = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

template <typename Element>
FASTATTN_INLINE Element* head_of(const AttentionTensor& t, int64_t batch, int64_t head) {
  return static_cast<Element*>(t.data) + batch * t.stride_batch + head * t.stride_head;
}

template <typename T, typename Element>
FASTATTN_INLINE void store_row(Element* dst, const T* src, int columns, T factor) {
  using V = Vec<T>;
  const V scale = V::set1(factor);
  const int whole = columns / V::kLanes * V::kLanes;
  for (int c = 0; c < whole; c += V::kLanes) (V::load(src + c) * scale).store_as(dst + c);
  if (whole < columns) (V::load(src + whole) * scale).store_as_partial(dst + whole, columns - whole);
}

// Writes row `row` of (batch, head): out and lse. src may be overwritten.
template <typename T, typename Element>
FASTATTN_INLINE void finish_row(const AttentionParams& p, int64_t batch, int64_t head, int64_t row,
                                RowStatistics row_is, double keep_scale, T* src) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double factor = keep_scale;
  if (row_is.sum == 0) {
    // A row that saw nothing is 0, whatever the values hold.
    for (int64_t c = 0; c < whole_vectors<T>(p.head_dim_v); ++c) src[c] = 0;
    factor = 0;
  }
  double largest = row_is.largest, sum = row_is.sum;
  if (p.sinks) {
    // One more logit without a value.
    const double sink = static_cast<double>(static_cast<const T*>(p.sinks)[head]);
    const double both = max_of(largest, sink);
    if (both > -kInfinity) {
      const double rescale = __builtin_exp(largest - both);
      sum = sum * rescale + __builtin_exp(sink - both);
      factor *= rescale;
      largest = both;
    }
  }
  T* lse = static_cast<T*>(p.lse) + lse_offset(p, batch, head);
  lse[row] = static_cast<T>(sum == 0 ? -kInfinity : largest + __builtin_log(sum));
  store_row(head_of<Element>(p.out, batch, head) + row * p.out.stride_row, src, static_cast<int>(p.head_dim_v),
            static_cast<T>(sum == 0 ? 0 : factor / sum));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
