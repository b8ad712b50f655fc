// What the forward and backward kernels of layer norm share: how a row is divided among threads, and the accesses to
// it.
//
// A row is cut into chunks of kChunk neighbouring elements (16 bytes of the widest tensor). Thread t of the kThreads
// that share a row owns chunks t, t + kThreads, ...: consecutive threads read consecutive memory.
#pragma once

#include "common/device.h"
#include "common/launch.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "layer_norm/layer_norm.h"

namespace fastattn {

// How many threads share a row, how many chunks each of them keeps in registers, and how many blocks are to fit on a
// multiprocessor, which bounds the registers of a thread.
template <int kThreads_, int kChunks_, int kBlocksPerMultiprocessor_ = 1>
struct RowShape {
  static constexpr int kThreads = kThreads_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kBlocksPerMultiprocessor = kBlocksPerMultiprocessor_;
  // Short rows share a block.
  static constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
  static constexpr int kRowsPerBlock = kBlockThreads / kThreads;
  static constexpr int kWarpsPerRow = kThreads < 32 ? 1 : kThreads / 32;
  static_assert(kThreads <= 32 || kRowsPerBlock == 1, "rows of several warps have the block, whose barriers they use");
};

// What a block has of every row: all of it, or the share of one block in a cluster. Starts at a whole chunk.
struct Columns {
  int begin, end;
};

template <typename Element, typename OutElement>
constexpr int kChunkOf = 16 / (sizeof(Element) > sizeof(OutElement) ? sizeof(Element) : sizeof(OutElement));

// --- Accesses --------------------------------------------------------------------------------------------------------

template <typename Element>
FASTATTN_DEVICE Element* row_pointer(const RowTensor& tensor, int64_t row) {
  return static_cast<Element*>(tensor.data) + row * tensor.stride_row;
}

// Elements [column, column + kCount) of a row; past its end 0. `aligned`: column 0 of every row is aligned to a chunk.
template <int kCount, typename Element>
FASTATTN_DEVICE Vec<Element, kCount> load_chunk(const Element* row, int column, int cols, bool aligned) {
  if (aligned && column + kCount <= cols) return load_vec<kCount>(row + column);
  Vec<Element, kCount> chunk;
#pragma unroll
  for (int i = 0; i < kCount; ++i) chunk[i] = column + i < cols ? row[column + i] : from_float<Element>(0.0f);
  return chunk;
}

template <typename Element, int kCount>
FASTATTN_DEVICE void store_chunk(Element* row, const Vec<Element, kCount>& chunk, int column, int cols, bool aligned) {
  if (aligned && column + kCount <= cols) {
    store_vec(row + column, chunk);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i < cols) row[column + i] = chunk[i];
  }
}

// A chunk in fp32, whose access takes two instructions where it is longer than 16 bytes.
template <int kCount>
struct Floats {
  float value[kCount];
  FASTATTN_DEVICE float& operator[](int i) { return value[i]; }
  FASTATTN_DEVICE float operator[](int i) const { return value[i]; }
};

template <int kCount>
FASTATTN_DEVICE Floats<kCount> load_floats(const float* row, int column, int cols, bool aligned) {
  Floats<kCount> floats;
#pragma unroll
  for (int begin = 0; begin < kCount; begin += 4) {
    const Vec<float, 4> part = load_chunk<4>(row, column + begin, cols, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) floats[begin + i] = part[i];
  }
  return floats;
}

template <int kCount>
FASTATTN_DEVICE void store_floats(float* row, const Floats<kCount>& floats, int column, int cols, bool aligned) {
#pragma unroll
  for (int begin = 0; begin < kCount; begin += 4) {
    Vec<float, 4> part;
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = floats[begin + i];
    store_chunk(row, part, column + begin, cols, aligned);
  }
}

template <typename Element, int kCount>
FASTATTN_DEVICE Floats<kCount> to_floats(const Vec<Element, kCount>& chunk) {
  Floats<kCount> floats;
#pragma unroll
  for (int i = 0; i < kCount; ++i) floats[i] = to_float(chunk[i]);
  return floats;
}

template <typename Element, int kCount>
FASTATTN_DEVICE Vec<Element, kCount> from_floats(const Floats<kCount>& floats) {
  Vec<Element, kCount> chunk;
#pragma unroll
  for (int i = 0; i < kCount; ++i) chunk[i] = from_float<Element>(floats[i]);
  return chunk;
}

// --- Dropout ---------------------------------------------------------------------------------------------------------

// What the rows of a kernel drop; with kDrops false, nothing, and no code is made for it.
template <bool kDrops>
struct RowDropout {
  uint64_t seed = 0;
  uint32_t offset = 0, threshold = 0;
  float scale = 1.0f;  // of what is kept

  // rng_state is read here, on the device: a captured graph draws new numbers at every replay.
  FASTATTN_DEVICE RowDropout(double dropout_p, const int64_t* rng_state) {
    if constexpr (kDrops) {
      seed = static_cast<uint64_t>(rng_state[0]);
      offset = static_cast<uint32_t>(rng_state[1]);
      threshold = dropout_threshold(dropout_p);
      scale = dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f;
    }
  }

  // Dropped elements become 0, kept ones are scaled; `column` is a multiple of kCount.
  template <int kCount>
  FASTATTN_DEVICE void apply(Floats<kCount>& values, int64_t row, int column) const {
    static_assert(kCount == 4 || kCount == 8, "within one word of a draw");
    if constexpr (kDrops) {
#pragma unroll
      for (int pair = 0; pair < kCount; pair += 2) apply_pair(values[pair], values[pair + 1], row, column + pair);
    }
  }

 private:
  FASTATTN_DEVICE void apply_pair(float& even, float& odd, int64_t row, int column) const {
    const PhiloxState counter = {
        {dropout_group(column), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), offset}};
    const PhiloxState draw = philox_4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    // Registers have no address: an index that is known only at run time would send the draw through memory.
    const uint32_t low = column & 8 ? draw.word[1] : draw.word[0], high = column & 8 ? draw.word[3] : draw.word[2];
    const uint32_t bits = column & 16 ? high : low;
    even = (bits & 0xFFFFu) >= threshold ? even * scale : 0.0f;
    odd = (bits >> 16) >= threshold ? odd * scale : 0.0f;
  }
};

// --- Sums ------------------------------------------------------------------------------------------------------------

template <int kWarps, int kSums>
using SumScratch = float[kSums][kWarps];

// Sums each value over the kThreads that share a row, all values in one go; every thread gets the same bits.
template <int kThreads, int kWarps, int kScratchSums, int kSums>
FASTATTN_DEVICE void sum_over_row(float (&values)[kSums], SumScratch<kWarps, kScratchSums>& scratch) {
  static_assert(kSums <= kScratchSums && kWarps == (kThreads < 32 ? 1 : kThreads / 32));
#pragma unroll
  for (int i = 0; i < kSums; ++i) values[i] = warp_reduce<(kThreads < 32 ? kThreads : 32)>(values[i], Sum{});
  if constexpr (kWarps > 1) {
    __syncthreads();  // everybody has read the last sums
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (threadIdx.x % 32 == 0) scratch[i][threadIdx.x / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] = warp_reduce<kWarps>(scratch[i][threadIdx.x % kWarps], Sum{});
  }
}

// --- Dispatch --------------------------------------------------------------------------------------------------------

template <typename T>
struct TypeTag {
  using type = T;
};

// fn(tag of x's element, tag of out's element) for the pairs that exist; returns its result.
template <typename Fn>
const char* dispatch_elements(DType x, DType out, Fn&& fn) {
  const auto same = x == out || x == DType::kFloat32;
  if (same && out == DType::kFloat16) {
    return x == out ? fn(TypeTag<half_t>{}, TypeTag<half_t>{}) : fn(TypeTag<float>{}, TypeTag<half_t>{});
  }
  if (same && out == DType::kBFloat16) {
    return x == out ? fn(TypeTag<bfloat16_t>{}, TypeTag<bfloat16_t>{}) : fn(TypeTag<float>{}, TypeTag<bfloat16_t>{});
  }
  if (same && out == DType::kFloat32) return fn(TypeTag<float>{}, TypeTag<float>{});
  return "the CUDA kernels take float16, bfloat16 or float32, and a float32 residual with 16-bit inputs";
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether every row of a tensor starts at a multiple of its chunk; true for an absent one.
template <typename Element>
bool rows_are_aligned(const RowTensor& tensor, int chunk) {
  return tensor.data == nullptr || (is_aligned(tensor.data, sizeof(Element) * chunk) && tensor.stride_row % chunk == 0);
}

}  // namespace fastattn
