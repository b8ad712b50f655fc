// A step of decoding before its attention: new keys and values go to the cache, and queries and keys are rotated by
// their positions. See kv_append.cuh for the GPU's.
// Work:    a task is some rows, one head's of one token.
// Numbers: rotated in fp32 (fp64 for fp64 inputs), rounded once.
// Source:  Su et al., arXiv:2104.09864.
#include <cstring>

#include "attention/kv_cache.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Rows that are worth a thread of their own.
constexpr int64_t kRowsPerTask = 256;

// The row of `to` for token `token` of sequence `batch`, head 0.
template <typename Element>
Element* appended_row(const KvCache& cache, const AppendedRows& rows, int64_t batch, int64_t token) {
  Element* to = static_cast<Element*>(rows.to.data);
  if (!rows.to_cache) return to + batch * rows.to.stride_batch + token * rows.to.stride_row;
  const int place = tokens_before(cache, batch) + static_cast<int>(token), block = place / cache.block_size;
  return to + cache_entry(cache, batch, block) * rows.to.stride_batch +
         (place - block * cache.block_size) * rows.to.stride_row;
}

// T: what is multiplied.
template <typename T, typename Element, typename Angle>
void rotate_row(const Element* from, Element* to, const Angle* cos, const Angle* sin, int64_t pairs,
                bool is_interleaved) {
  // Where the second element of a pair is, and the next pair.
  const int64_t second = is_interleaved ? 1 : pairs, step = is_interleaved ? 2 : 1;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const T a = to_float(from[pair * step]), b = to_float(from[pair * step + second]);
    const T c = static_cast<T>(to_float(cos[pair])), s = static_cast<T>(to_float(sin[pair]));
    if constexpr (sizeof(T) == sizeof(double)) {
      to[pair * step] = a * c - b * s;
      to[pair * step + second] = a * s + b * c;
    } else {
      to[pair * step] = from_float<Element>(a * c - b * s);
      to[pair * step + second] = from_float<Element>(a * s + b * c);
    }
  }
}

template <typename T, typename Element, typename Angle>
void append(const KvAppendParams& p) {
  for (int i = 0; i < p.operand_count; ++i) {
    const AppendedRows& rows = p.operands[i];
    const int64_t pairs = rows.is_rotated ? p.rotary_dim / 2 : 0;
    parallel_ranges(p.batch * rows.tokens * rows.heads, kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row % rows.heads, token = row / rows.heads % rows.tokens;
        const int64_t batch = row / rows.heads / rows.tokens;
        const Element* from = static_cast<const Element*>(rows.from.data) + batch * rows.from.stride_batch +
                              head * rows.from.stride_head + token * rows.from.stride_row;
        Element* to = appended_row<Element>(p.cache, rows, batch, token) + head * rows.to.stride_head;
        if (pairs > 0) {
          const int64_t position = min_of(tokens_before(p.cache, batch) + token, p.positions - 1);
          rotate_row<T>(from, to, static_cast<const Angle*>(p.cos) + position * p.stride_cos,
                        static_cast<const Angle*>(p.sin) + position * p.stride_sin, pairs, p.is_interleaved);
        }
        std::memcpy(to + 2 * pairs, from + 2 * pairs, static_cast<size_t>(rows.head_dim - 2 * pairs) * sizeof(Element));
      }
    });
  }
}

template <typename Element>
void append_half(const KvAppendParams& p) {
  return p.angle_dtype == DType::kFloat32 ? append<float, Element, float>(p) : append<float, Element, Element>(p);
}

}  // namespace

void kv_append_cpu(const KvAppendParams& p) {
  switch (p.dtype) {
    case DType::kFloat64:
      return append<double, double, double>(p);
    case DType::kBFloat16:
      return append_half<BFloat16>(p);
    case DType::kFloat16:
      return append_half<Float16>(p);
    default:
      return append<float, float, float>(p);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
