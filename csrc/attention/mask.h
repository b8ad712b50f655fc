// Which keys the causal diagonal and the window leave to a query, and so which tiles a kernel has to visit.
// Row i stands at key i + diagonal and sees the keys of [i + diagonal - window_left, i + diagonal + window_right] that
// exist.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/host_device.h"

namespace fastattn {

// [begin, end); empty ranges have begin == end.
struct IndexRange {
  int64_t begin = 0, end = 0;
};

FASTATTN_HOST_DEVICE IndexRange clip_range(int64_t begin, int64_t end, int64_t count) {
  begin = begin < 0 ? 0 : begin > count ? count : begin;
  end = end > count ? count : end;
  return {begin, end < begin ? begin : end};
}

struct Band {
  int64_t seqlen_q = 0, seqlen_k = 0, diagonal = 0, window_left = kUnlimited, window_right = kUnlimited;

  // Keys that at least one row of [rows.begin, rows.end) sees.
  FASTATTN_HOST_DEVICE IndexRange keys_seen_by_any(IndexRange rows) const {
    return clip_range(rows.begin + diagonal - window_left, rows.end + diagonal + window_right, seqlen_k);
  }
  // Keys that every row of [rows.begin, rows.end) sees.
  FASTATTN_HOST_DEVICE IndexRange keys_seen_by_all(IndexRange rows) const {
    return clip_range(rows.end - 1 + diagonal - window_left, rows.begin + diagonal + window_right + 1, seqlen_k);
  }
  FASTATTN_HOST_DEVICE IndexRange keys_seen_by(int64_t row) const { return keys_seen_by_any({row, row + 1}); }
  // Rows that see at least one key of [keys.begin, keys.end), which must exist.
  FASTATTN_HOST_DEVICE IndexRange rows_that_see(IndexRange keys) const {
    return clip_range(keys.begin - diagonal - window_right, keys.end - diagonal + window_left, seqlen_q);
  }
};

FASTATTN_HOST_DEVICE Band make_band(const AttentionParams& p) {
  return {p.seqlen_q, p.seqlen_k, p.diagonal, p.window_left, p.window_right};
}

}  // namespace fastattn
