// Forward attention for a few queries against many keys: see attention_decode_cpu.cpp.
#pragma once

#include "attention/attention.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Too few rows share a kv head to pay for packing its keys, and its rows are whole vectors.
FASTATTN_INLINE bool decode_suits(const AttentionParams& p) {
  const int64_t lanes = p.dtype == DType::kFloat64 ? Vec<double>::kLanes : Vec<float>::kLanes;
  const bool few_rows = p.seqlen_q <= 4 || p.seqlen_q * (p.heads / p.heads_kv) <= 8;
  return few_rows && p.head_dim % lanes == 0 && p.head_dim_v % lanes == 0;
}

void attention_decode_cpu(const AttentionParams& p);

}  // namespace FASTATTN_ISA
}  // namespace fastattn
