// The gradient of the sinks. A sink is a column whose p has no value to multiply, so its dp is 0 and its
// ds = p * (dlse - delta), summed over batch and rows.
#pragma once

#include "attention/attention.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Each block of rows leaves its part in a place of its own; reduce() adds the parts in rising order.
template <typename T>
class SinkGradient {
 public:
  FASTATTN_INLINE static int64_t partial_count(const AttentionBwdParams& p, int64_t query_blocks) {
    return p.dsinks ? p.batch * p.heads * query_blocks : 0;
  }

  // `partials` are zero. query_blocks: those of the longest batch entry.
  FASTATTN_INLINE SinkGradient(const AttentionBwdParams& p, double* partials, int64_t query_blocks)
      : p_(p), partials_(partials), query_blocks_(query_blocks) {}

  // exp(sink - lse), 0 without a sink.
  FASTATTN_INLINE double probability(int64_t head, T lse) const {
    if (!p_.sinks) return 0;
    return __builtin_exp(static_cast<const T*>(p_.sinks)[head] - static_cast<double>(lse));
  }

  FASTATTN_INLINE void set(int64_t batch, int64_t head, int64_t query_block, double gradient) const {
    if (p_.dsinks) partials_[(batch * p_.heads + head) * query_blocks_ + query_block] = gradient;
  }

  FASTATTN_INLINE void reduce() const {
    if (p_.dsinks == nullptr) return;
    for (int64_t head = 0; head < p_.heads; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < p_.batch; ++batch) {
        const double* partials = partials_ + (batch * p_.heads + head) * query_blocks_;
        for (int64_t block = 0; block < query_blocks_; ++block) sum += partials[block];
      }
      static_cast<T*>(p_.dsinks)[head] = static_cast<T>(sum);
    }
  }

 private:
  const AttentionBwdParams& p_;
  double* partials_;
  int64_t query_blocks_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
