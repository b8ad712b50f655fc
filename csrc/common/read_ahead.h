// Memory that the next task will read, brought into L2 a few lines at a time between pieces of arithmetic.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Asked for all at once, lines would fill the buffers for outstanding misses, and the loads of the arithmetic would
// wait behind them. So step() asks for no more than arrive while one register tile is multiplied.
class ReadAhead {
 public:
  FASTATTN_INLINE void clear() { matrices_ = current_ = 0, lines_ = 0; }

  // What does not fit kMostMatrices is read when its time comes.
  FASTATTN_INLINE void add(const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
    if (matrices_ == kMostMatrices || rows <= 0 || row_bytes <= 0) return;
    if (stride_bytes == row_bytes) row_bytes *= rows, rows = 1;
    at_[matrices_++] = {static_cast<const char*>(data), rows, row_bytes, stride_bytes};
    lines_ += rows * ((row_bytes + kLine - 1) / kLine);
  }

  // To be read in about `steps` steps, in the order of the calls of add(). Nothing is read if it would take more of L2
  // than a task leaves: a task with so many operands has enough arithmetic for each to hide the misses.
  FASTATTN_INLINE void spread(int64_t steps) {
    constexpr int64_t kMostBytes = int64_t{256} << 10;
    if (lines_ * kLine > kMostBytes || steps <= 0) return clear();
    lines_a_step_ = min_of((lines_ + steps - 1) / steps, kMostLinesAStep);
    column_ = 0;
  }

  FASTATTN_INLINE void step() {
    for (int64_t lines = lines_a_step_; lines > 0 && current_ < matrices_;) {
      Matrix& matrix = at_[current_];
      const char* line = matrix.data + column_;
      const int64_t left = (matrix.row_bytes - column_ + kLine - 1) / kLine, count = min_of(lines, left);
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(line + i * kLine, /*to write=*/0, /*locality, L2=*/2);
      lines -= count;
      column_ += count * kLine;
      if (count < left) break;
      column_ = 0;
      matrix.data += matrix.stride;
      if (--matrix.rows == 0) ++current_;
    }
  }

 private:
  static constexpr int64_t kLine = 64, kMostLinesAStep = 32;
  static constexpr int kMostMatrices = 8;
  struct Matrix {
    const char* data;
    int64_t rows, row_bytes, stride;
  };

  Matrix at_[kMostMatrices];
  int matrices_ = 0, current_ = 0;
  int64_t lines_ = 0, lines_a_step_ = 0, column_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
