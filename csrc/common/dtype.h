// Element types, without torch headers.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool, kInt8, kInt32 };

// Storage only: 16 bits each, converted by common/simd.h (CPU) or the device's own types (CUDA).
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fastattn
