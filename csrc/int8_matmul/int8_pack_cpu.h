// The two operand layouts that dot_tile reads: panels of 32 columns of B, panels of kTileRows rows of A.
#pragma once

#include "common/simd.h"
#include "int8_matmul/int8_dot_cpu.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Four neighbours in k of one row; past the end of the row they are 0.
FASTATTN_INLINE uint32_t load_group(const int8_t* row, int64_t k, int64_t depth) {
  uint32_t group = 0;
  if (k + kGroupDepth <= depth) {
    std::memcpy(&group, row + k, 4);
  } else {
    for (int64_t i = 0; k + i < depth; ++i) group |= uint32_t{static_cast<uint8_t>(row[k + i])} << (8 * i);
  }
  return group;
}

// panel[g][c][0..4) = b[c][4g..4g+4) for `columns` (1 to 32) rows of b, zero elsewhere.
inline void pack_b_panel(const int8_t* b, int64_t stride_b, int64_t columns, int64_t depth, int8_t* panel) {
  const int64_t groups = int8_groups(depth);
  // Several groups a visit: a cache line of each row serves 16 of them.
  constexpr int64_t kVisit = 16;
  for (int64_t first = 0; first < groups; first += kVisit) {
    const int64_t last = min_of(first + kVisit, groups);
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      for (int64_t g = first; g < last; ++g) {
        const uint32_t group = c < columns ? load_group(b + c * stride_b, g * kGroupDepth, depth) : 0;
        std::memcpy(panel + g * kPanelColumnGroup + c * kGroupDepth, &group, 4);
      }
    }
  }
}

// -128 * sum over k of the panel, per column: undoes the 128 that is added to A for VNNI (see int8_dot_cpu.h).
inline void panel_compensation(const int8_t* panel, int64_t depth, int32_t* compensation) {
  uint32_t sums[kPanelColumns] = {};
  for (int64_t g = 0; g < int8_groups(depth); ++g) {
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      const int8_t* group = panel + g * kPanelColumnGroup + c * kGroupDepth;
      sums[c] += static_cast<uint32_t>(group[0] + group[1] + group[2] + group[3]);
    }
  }
  for (int64_t c = 0; c < kPanelColumns; ++c) compensation[c] = static_cast<int32_t>(-128 * sums[c]);
}

// panel[g][r][0..4) = a[r][4g..4g+4) as Dot::A, for `rows` (1 to kTileRows) rows of a.
inline void pack_a_panel(const int8_t* a, int64_t stride_a, int rows, int64_t depth, Dot::A* panel) {
  const int64_t groups = int8_groups(depth);
  for (int r = 0; r < rows; ++r) {
    const int8_t* row = a + r * stride_a;
    Dot::A* target = panel + r * kGroupDepth;
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t group = load_group(row, g * kGroupDepth, depth);
      if constexpr (sizeof(Dot::A) == 1) {
        // q + 128 of each byte is q with its top bit flipped.
        const uint32_t shifted = group ^ 0x80808080u;
        std::memcpy(target + g * kPanelRowGroup, &shifted, 4);
      } else {
        for (int i = 0; i < kGroupDepth; ++i) {
          target[g * kPanelRowGroup + i] = static_cast<Dot::A>(static_cast<int8_t>(group >> (8 * i)));
        }
      }
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
