// Batch entries of different lengths on the CPU: the parameters of one of them, the order of packed sequences' tasks,
// and the rows that no sequence has.
#pragma once

#include <cstring>

#include "attention/attention.h"
#include "attention/kv_cache.h"
#include "attention/packed.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
FASTATTN_INLINE int64_t statistics_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

FASTATTN_INLINE void* skip_bytes(const void* data, int64_t bytes) {
  return data ? const_cast<char*>(static_cast<const char*>(data)) + bytes : nullptr;
}
FASTATTN_INLINE void skip_rows(AttentionTensor& tensor, int64_t rows, DType dtype) {
  tensor.data = skip_bytes(tensor.data, rows * tensor.stride_row * element_bytes(dtype));
}

// Makes p the parameters of batch entry `batch` alone: its lengths, its diagonal, and its first rows as row 0. The
// entry keeps its number, by which dropout, ALiBi and a cache know it. Of a dense batch, p is that already.
FASTATTN_INLINE void narrow_to_entry(AttentionParams& p, int64_t batch) {
  if (is_cached(p)) {
    p.seqlen_k = min_of<int64_t>(p.seqlen_k, int64_t{tokens_before(p.cache, batch)} + p.cache.appended);
    p.diagonal = p.seqlen_k - p.seqlen_q;
    return;
  }
  if (!is_packed(p)) return;
  const IndexRange rows = packed_sequence(p.packed_q, batch, p.seqlen_q);
  const IndexRange keys = packed_sequence(p.packed_k, batch, p.seqlen_k);
  p.seqlen_q = rows.end - rows.begin;
  p.seqlen_k = keys.end - keys.begin;
  p.diagonal = p.packed_bottom_right ? p.seqlen_k - p.seqlen_q : 0;
  skip_rows(p.q, rows.begin, p.dtype);
  skip_rows(p.out, rows.begin, p.dtype);
  skip_rows(p.k, keys.begin, p.dtype);
  skip_rows(p.v, keys.begin, p.dtype);
  p.lse = skip_bytes(p.lse, rows.begin * statistics_bytes(p.dtype));
}
FASTATTN_INLINE void narrow_to_entry(AttentionBwdParams& p, int64_t batch) {
  if (!is_packed(p)) return;
  const int64_t row = packed_sequence(p.packed_q, batch, p.seqlen_q).begin;
  const int64_t key = packed_sequence(p.packed_k, batch, p.seqlen_k).begin;
  narrow_to_entry(static_cast<AttentionParams&>(p), batch);
  skip_rows(p.dout, row, p.dtype);
  skip_rows(p.dq, row, p.dtype);
  skip_rows(p.dk, key, p.dtype);
  skip_rows(p.dv, key, p.dtype);
  p.dlse = skip_bytes(p.dlse, row * statistics_bytes(p.dtype));
}

// One of the tasks of a batch entry.
struct EntryTask {
  int64_t batch, index;
};

// The tasks of a call in the order in which threads take them: entry by entry, and of packed sequences those with most
// work first, so that no thread starts a long one when the others are about to finish.
class EntryTasks {
 public:
  // tasks_of(batch): how many tasks the entry has; equally many for each entry of a dense batch.
  template <typename TasksOf>
  FASTATTN_INLINE EntryTasks(const AttentionParams& p, TasksOf&& tasks_of)
      : memory_(1, is_packed(p) ? 2 * p.batch * static_cast<int64_t>(sizeof(int64_t)) : 0), entries_(p.batch) {
    if (!is_packed(p)) {
      tasks_each_ = p.batch > 0 ? tasks_of(0) : 0;
      count_ = p.batch * tasks_each_;
      return;
    }
    order_ = reinterpret_cast<int64_t*>(memory_.piece(0));
    first_task_ = order_ + p.batch;
    int64_t starts[kWorkClasses + 1] = {};
    for (int64_t batch = 0; batch < p.batch; ++batch) ++starts[work_class(p, batch) + 1];
    for (int i = 0; i < kWorkClasses; ++i) starts[i + 1] += starts[i];
    for (int64_t batch = 0; batch < p.batch; ++batch) order_[starts[work_class(p, batch)]++] = batch;
    for (int64_t i = 0; i < p.batch; ++i) {
      first_task_[i] = count_;
      count_ += tasks_of(order_[i]);
    }
  }

  FASTATTN_INLINE int64_t count() const { return count_; }
  FASTATTN_INLINE EntryTask at(int64_t task) const {
    if (order_ == nullptr) return {task / tasks_each_, task % tasks_each_};
    // The last entry that starts at or before the task: one without tasks starts where the next one does.
    int64_t low = 0, high = entries_;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_task_[middle] <= task ? low : high) = middle;
    }
    return {order_[low], task - first_task_[low]};
  }

 private:
  // Eight classes between powers of two; class 0 has most work.
  static constexpr int kWorkClasses = 8 * 64;

  FASTATTN_INLINE static int work_class(const AttentionParams& p, int64_t batch) {
    const IndexRange rows = packed_sequence(p.packed_q, batch, p.seqlen_q);
    const IndexRange keys = packed_sequence(p.packed_k, batch, p.seqlen_k);
    const int64_t work = (rows.end - rows.begin + 1) * (keys.end - keys.begin + 1) * 8;
    const int exponent = 63 - __builtin_clzll(static_cast<unsigned long long>(work));
    return kWorkClasses - 1 - (exponent * 8 + static_cast<int>(work >> (exponent - 3)) % 8);
  }

  Scratch memory_;
  int64_t entries_, count_ = 0, tasks_each_ = 0;
  int64_t *order_ = nullptr, *first_task_ = nullptr;
};

// fn(begin, end) for the rows that no sequence has.
template <typename Fn>
FASTATTN_INLINE void for_each_gap(const PackedRows& rows, int64_t batch, int64_t longest, Fn&& fn) {
  for (int64_t gap = 0; gap <= batch; ++gap) {
    const IndexRange range = packed_gap(rows, gap, batch, longest);
    if (range.begin < range.end) fn(range.begin, range.end);
  }
}

// Zeros in the rows of a (total, heads, columns) tensor that no sequence has.
FASTATTN_INLINE void clear_gaps(const AttentionTensor& tensor, DType dtype, int64_t heads, int64_t columns,
                                const PackedRows& rows, int64_t batch, int64_t longest) {
  for_each_gap(rows, batch, longest, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const int64_t bytes = element_bytes(dtype);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        std::memset(skip_bytes(tensor.data, (head * tensor.stride_head + row * tensor.stride_row) * bytes), 0,
                    static_cast<size_t>(columns * bytes));
      }
    }
  });
}

// The result of the rows that no sequence has: out is 0, lse -inf.
template <typename T>
FASTATTN_INLINE void finish_gaps(const AttentionParams& p) {
  clear_gaps(p.out, p.dtype, p.heads, p.head_dim_v, p.packed_q, p.batch, p.seqlen_q);
  for_each_gap(p.packed_q, p.batch, p.seqlen_q, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t head = 0; head < p.heads; ++head) {
      T* lse = static_cast<T*>(p.lse) + head * p.packed_q.total;
      for (int64_t row = begin; row < end; ++row) lse[row] = -static_cast<T>(__builtin_inf());
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
