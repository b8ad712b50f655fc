// Where one head's keys or values lie: row behind row in a tensor, or in the blocks of a cache that a table names. A
// run is a stretch of rows of equal distance: of a tensor all of them, of a paged cache those of one block.
#pragma once

#include "attention/attention.h"
#include "attention/attention_finish_cpu.h"
#include "attention/attention_pack_cpu.h"
#include "attention/kv_cache.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <typename Element>
class CachedRows {
 public:
  // `tensor`: p.k or p.v.
  FASTATTN_INLINE CachedRows(const AttentionParams& p, const AttentionTensor& tensor, int64_t batch, int64_t kv_head)
      : cache_(&p.cache), batch_(batch), stride_entry_(tensor.stride_batch), stride_(tensor.stride_row) {
    const bool paged = p.cache.table != nullptr;
    first_ = head_of<const Element>(tensor, paged ? 0 : batch, kv_head);
    block_size_ = paged ? p.cache.block_size : 0;
  }

  FASTATTN_INLINE int64_t stride() const { return stride_; }
  FASTATTN_INLINE const Element* row(int64_t index) const {
    if (block_size_ == 0) return first_ + index * stride_;
    const int block = static_cast<int>(index) / block_size_, place = static_cast<int>(index) - block * block_size_;
    return first_ + cache_entry(*cache_, batch_, block) * stride_entry_ + place * stride_;
  }
  // The end of the run that `index` is in, at most `end`.
  FASTATTN_INLINE int64_t run_end(int64_t index, int64_t end) const {
    if (block_size_ == 0) return end;
    return min_of(end, (static_cast<int>(index) / block_size_ + int64_t{1}) * block_size_);
  }

  FASTATTN_INLINE bool is_run(int64_t row0, int count) const { return run_end(row0, row0 + count) == row0 + count; }

  // The addresses of a tile's rows, of which `count` > 0 exist: in place of the others, the last one's.
  FASTATTN_INLINE void addresses(const Element* (&rows)[kTileKeys], int64_t row0, int count) const {
    int i = 0;
    while (i < count) {
      const Element* address = row(row0 + i);
      const int end = static_cast<int>(run_end(row0 + i, row0 + count) - row0);
      for (; i < end; ++i, address += stride_) rows[i] = address;
    }
    for (; i < kTileKeys; ++i) rows[i] = rows[count - 1];
  }

  // fn(rows), where rows[i] is row row0 + i for i < count.
  template <typename Fn>
  FASTATTN_INLINE void with_tile(int64_t row0, int count, Fn&& fn) const {
    if (is_run(row0, count)) return fn(StridedRows<Element>{row(row0), stride_});
    const Element* rows[kTileKeys];
    addresses(rows, row0, count);
    fn(rows);
  }

 private:
  const Element* first_;
  const KvCache* cache_;
  int64_t batch_, stride_entry_, stride_;
  int block_size_;  // 0: there is no table
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
