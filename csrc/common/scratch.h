// Working memory of one kernel call: one cache-aligned piece a thread, in a single allocation.
#pragma once

#include <cstdint>

#include "common/memory.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

class Scratch {
 public:
  FASTATTN_INLINE Scratch(int pieces, int64_t bytes_each)
      // The odd line keeps equal offsets of two pieces, and of rows in them, out of the same cache set.
      : stride_((bytes_each + 63) / 64 * 64 + 64), memory_(static_cast<char*>(allocate_aligned(pieces * stride_))) {}
  FASTATTN_INLINE ~Scratch() { free_aligned(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  FASTATTN_INLINE char* piece(int index) const { return memory_ + index * stride_; }

 private:
  int64_t stride_;
  char* memory_;
};

// Hands out arrays, each on a cache line of its own, from the front of a piece; with no piece it only counts.
class ScratchCursor {
 public:
  FASTATTN_INLINE explicit ScratchCursor(char* piece) : piece_(piece) {}
  template <typename T>
  FASTATTN_INLINE T* take(int64_t count) {
    T* array = piece_ ? reinterpret_cast<T*>(piece_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
  FASTATTN_INLINE int64_t bytes() const { return bytes_; }

 private:
  char* piece_;
  int64_t bytes_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
