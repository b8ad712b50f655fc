// What the layer norm kernels do with one row: loops over its vectors, and dropout.
#pragma once

#include "common/dropout_cpu.h"
#include "common/simd.h"
#include "layer_norm/layer_norm.h"

namespace fastattn {
namespace FASTATTN_ISA {

// --- Loops over a row -----------------------------------------------------------------------------------------------

// The width of one step: a whole vector, or the n elements that are left at the end of a row.
struct Full {};
struct Partial {
  int n;
};

template <typename T, typename Element>
FASTATTN_INLINE Vec<T> load(const Element* p, Full) {
  return Vec<T>::load_as(p);
}
template <typename T, typename Element>
FASTATTN_INLINE Vec<T> load(const Element* p, Partial width) {
  return Vec<T>::load_as_partial(p, width.n);
}
template <typename T, typename Element>
FASTATTN_INLINE void store(Vec<T> value, Element* p, Full) {
  value.store_as(p);
}
template <typename T, typename Element>
FASTATTN_INLINE void store(Vec<T> value, Element* p, Partial width) {
  value.store_as_partial(p, width.n);
}
// Lanes past the end of the row become 0: they read as 0, but 0 minus the mean is not.
template <typename T>
FASTATTN_INLINE Vec<T> zero_past_end(Vec<T> value, Full) {
  return value;
}
template <typename T>
FASTATTN_INLINE Vec<T> zero_past_end(Vec<T> value, Partial width) {
  return select(Vec<T>::first_lanes(width.n), value, Vec<T>::zero());
}

// fn(column, width) over the vectors of n columns.
template <typename T, typename Fn>
FASTATTN_INLINE void for_each_vector(int64_t n, Fn&& fn) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) fn(j, Full{});
  if (j < n) fn(j, Partial{static_cast<int>(n - j)});
}

// fn(slot, column, width) with slots 0 to kSlots - 1 in turn: an accumulator for each hides the latency of its
// addition.
template <typename T, int kSlots, typename Fn>
FASTATTN_INLINE void for_each_vector_slotted(int64_t n, Fn&& fn) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + kSlots * kLanes <= n; j += kSlots * kLanes) {
    unroll<kSlots>(FASTATTN_LAMBDA(slot) { fn(slot, j + slot * kLanes, Full{}); });
  }
  for_each_vector<T>(n - j, [&](int64_t rest, auto width) __attribute__((always_inline)) {
    fn(std::integral_constant<int, 0>{}, j + rest, width);
  });
}

template <typename T, int kSlots>
FASTATTN_INLINE Vec<T> sum_of(const Vec<T> (&slots)[kSlots]) {
  static_assert(kSlots == 4);
  return (slots[0] + slots[1]) + (slots[2] + slots[3]);
}

// --- Dropout --------------------------------------------------------------------------------------------------------

// fn(column, width, drop) over the vectors of a row; drop(value) is 0 where dropout drops, else value / (1 - p).
// The row is counted as (batch_head, row) = (row >> 32, row & 0xffffffff) of the rule in common/philox.h.
template <typename T, typename Fn>
FASTATTN_INLINE void for_each_dropped_vector(int64_t n, const Dropout& dropout, int64_t row, Fn&& fn) {
  constexpr int kChunk = 64;
  const Vec<T> scale = Vec<T>::set1(static_cast<T>(dropout.keep_scale));
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const uint64_t kept = dropout.kept_columns(static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(row), chunk);
    for_each_vector<T>(min_of<int64_t>(n - chunk, kChunk), [&](int64_t j, auto width) __attribute__((always_inline)) {
      const auto mask = Vec<T>::mask_from_bits(static_cast<uint32_t>(kept >> j));
      fn(chunk + j, width,
         [&](Vec<T> value) __attribute__((always_inline)) { return select(mask, value * scale, Vec<T>::zero()); });
    });
  }
}

// --- Dispatch -------------------------------------------------------------------------------------------------------

template <typename T>
struct TypeTag {
  using type = T;
};

// fn(tag of x's element, tag of out's element): equal, or fp32 rows whose result is half.
template <typename Fn>
FASTATTN_INLINE void dispatch_elements(DType x, DType out, Fn&& fn) {
  if (x == DType::kFloat32 && out == DType::kFloat32) fn(TypeTag<float>{}, TypeTag<float>{});
  if (x == DType::kFloat32 && out == DType::kBFloat16) fn(TypeTag<float>{}, TypeTag<BFloat16>{});
  if (x == DType::kFloat32 && out == DType::kFloat16) fn(TypeTag<float>{}, TypeTag<Float16>{});
  if (x == DType::kBFloat16 && out == DType::kBFloat16) fn(TypeTag<BFloat16>{}, TypeTag<BFloat16>{});
  if (x == DType::kFloat16 && out == DType::kFloat16) fn(TypeTag<Float16>{}, TypeTag<Float16>{});
  if (x == DType::kFloat64 && out == DType::kFloat64) fn(TypeTag<double>{}, TypeTag<double>{});
}

template <typename Element>
using StatisticsOf = std::conditional_t<std::is_same_v<Element, double>, double, float>;

template <typename Element>
FASTATTN_INLINE Element* row_of(const RowTensor& tensor, int64_t row) {
  return static_cast<Element*>(tensor.data) + row * tensor.stride_row;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
