// Quantises rows:  scale = max |x| / 127,  q = round_to_even(x * (1 / scale)).
// Work:    a warp, or a block of 4 or 8 warps, per row.
// Memory:  a row is read once, in 16-byte pieces that stay in registers between the maximum and the rounding; of rows
//          longer than 32 KiB the rest is read again. Rows that are not 16-byte aligned are read element by element.
// Numbers: those of quantize_int8_cpu.h, bit for bit. A zero row gives q = 0, scale = 1; one that holds NaN or
//          infinity q = 0, scale = NaN. The scale is at least 2^-126, so that its reciprocal is finite.
#pragma once

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {

template <typename Element_, int kWarpsPerRow_, int kVectors_>
struct QuantizeInt8Traits {
  using Element = Element_;
  static constexpr int kWarpsPerRow = kWarpsPerRow_, kThreadsPerRow = 32 * kWarpsPerRow;
  static constexpr int kVectors = kVectors_;                // 16-byte pieces that a thread keeps
  static constexpr int kWidth = 16 / int{sizeof(Element)};  // elements of a piece
  static constexpr int kThreads = kWarpsPerRow == 1 ? 256 : kThreadsPerRow;
  static constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
};

// Reads and writes pieces of one row. What lies past its end is read as 0 and not written.
template <typename Element, int kWidth>
struct QuantizedRow {
  const Element* x;
  int8_t* q;
  int64_t depth;
  bool x_aligned, q_aligned;

  FASTATTN_DEVICE QuantizedRow(const QuantizeInt8Params& p, int64_t row, int8_t* target)
      : x(static_cast<const Element*>(p.input) + row * p.stride_input),
        q(target),
        depth(p.depth),
        x_aligned(reinterpret_cast<uintptr_t>(x) % 16 == 0),
        q_aligned(reinterpret_cast<uintptr_t>(q) % kWidth == 0) {}

  FASTATTN_DEVICE Vec<Element, kWidth> load(int64_t first) const {
    if (x_aligned && first + kWidth <= depth) return load_vec<kWidth>(x + first);
    Vec<Element, kWidth> piece;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) piece[i] = first + i < depth ? x[first + i] : from_float<Element>(0.0f);
    return piece;
  }

  FASTATTN_DEVICE void store(int64_t first, const Vec<Element, kWidth>& piece, float inverse, bool finite) const {
    Vec<int8_t, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      rounded[i] = static_cast<int8_t>(finite ? __float2int_rn(to_float(piece[i]) * inverse) : 0);
    }
    if (q_aligned && first + kWidth <= depth) {
      store_vec(q + first, rounded);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (first + i < depth) q[first + i] = rounded[i];
      }
    }
  }
};

// The bits of |x|, the largest of a piece: as integers they are ordered like the values, infinity and then NaN last.
template <typename Element, int kWidth>
FASTATTN_DEVICE int largest_magnitude(const Vec<Element, kWidth>& piece) {
  int largest = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) largest = max(largest, __float_as_int(to_float(piece[i])) & 0x7FFFFFFF);
  return largest;
}

// The scale of a row whose largest magnitude has these bits; `inverse` is what its elements are multiplied by.
FASTATTN_DEVICE float row_scale_of(int largest_bits, float& inverse) {
  constexpr int kInfinity = 0x7F800000;
  const float scale = largest_bits == 0 ? 1.0f : fmaxf(__int_as_float(largest_bits) / 127.0f, 0x1p-126f);
  inverse = 1.0f / scale;
  return largest_bits < kInfinity ? scale : __int_as_float(0x7FC00000);
}

// Quantises a row by the kThreadsPerRow threads that own it, this one being number `thread`; all get the scale.
template <typename Traits>
FASTATTN_DEVICE float quantize_int8_row(const QuantizedRow<typename Traits::Element, Traits::kWidth>& io, int thread,
                                        int (&scratch)[Traits::kWarpsPerRow]) {
  const int64_t first = int64_t{thread} * Traits::kWidth;
  constexpr int kStep = Traits::kThreadsPerRow * Traits::kWidth;
  Vec<typename Traits::Element, Traits::kWidth> kept[Traits::kVectors];
  int largest = 0;
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    if (first + v * kStep < io.depth) kept[v] = io.load(first + v * kStep);
  }
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    if (first + v * kStep < io.depth) largest = max(largest, largest_magnitude(kept[v]));
  }
  for (int64_t k = first + Traits::kVectors * kStep; k < io.depth; k += kStep) {
    largest = max(largest, largest_magnitude(io.load(k)));
  }
  if constexpr (Traits::kWarpsPerRow == 1) {
    largest = warp_reduce(largest, Max());
  } else {
    largest = block_reduce<Traits::kWarpsPerRow>(largest, Max(), scratch);
  }

  float inverse;
  const float scale = row_scale_of(largest, inverse);
  const bool finite = scale == scale;
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    if (first + v * kStep < io.depth) io.store(first + v * kStep, kept[v], inverse, finite);
  }
  for (int64_t k = first + Traits::kVectors * kStep; k < io.depth; k += kStep) {
    io.store(k, io.load(k), inverse, finite);
  }
  return scale;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) quantize_int8_kernel(const __grid_constant__ QuantizeInt8Params p) {
  FASTATTN_SHARED(scratch, int[Traits::kWarpsPerRow]);
  const int thread = static_cast<int>(threadIdx.x) % Traits::kThreadsPerRow;
  const int row_in_block = static_cast<int>(threadIdx.x) / Traits::kThreadsPerRow;
  const int64_t row = int64_t{blockIdx.x} * Traits::kRowsPerBlock + row_in_block;
  if (row >= p.rows) return;  // whole warps, or the whole block
  const QuantizedRow<typename Traits::Element, Traits::kWidth> io(p, row, p.q + row * p.stride_q);
  const float scale = quantize_int8_row<Traits>(io, thread, scratch);
  if (thread == 0) p.scale[row] = scale;
}

}  // namespace fastattn
