// Packed sequences: where a batch entry lies, which rows no entry has, and the parameters of one entry. Lengths come
// from the caller and on a GPU nobody has checked them, so everything that addresses memory by them comes through here.
#pragma once

#include "attention/mask.h"

namespace fastattn {

FASTATTN_HOST_DEVICE bool is_packed(const AttentionParams& p) { return p.packed_q.cu_seqlens != nullptr; }

// Rows of sequence `batch`: inside the tensor and no more than `longest`, whatever cu_seqlens holds.
FASTATTN_HOST_DEVICE IndexRange packed_sequence(const PackedRows& rows, int64_t batch, int64_t longest) {
  const IndexRange range = clip_range(rows.cu_seqlens[batch], rows.cu_seqlens[batch + 1], rows.total);
  return {range.begin, range.end - range.begin > longest ? range.begin + longest : range.end};
}

// Rows between sequence `gap` - 1 and the next, for gap in [0, batch]. From row 0 to `total`, sequences and gaps lead
// step by step, so each row is in one of them, even where cu_seqlens falls. Correct ones leave rows after the last
// sequence.
FASTATTN_HOST_DEVICE IndexRange packed_gap(const PackedRows& rows, int64_t gap, int64_t batch, int64_t longest) {
  const int64_t begin = gap == 0 ? 0 : packed_sequence(rows, gap - 1, longest).end;
  const int64_t end = gap == batch ? rows.total : packed_sequence(rows, gap, longest).begin;
  return {begin, end < begin ? begin : end};
}

// Where the lse of (batch, head) starts: of a sequence, that of the tensor's row 0.
FASTATTN_HOST_DEVICE int64_t lse_offset(const AttentionParams& p, int64_t batch, int64_t head) {
  return is_packed(p) ? head * p.packed_q.total : (batch * p.heads + head) * p.seqlen_q;
}

}  // namespace fastattn
