// The emulator's CUtensorMap: same size, same rules, readable content.
#pragma once

#include <cstdint>

namespace fastattn::emu {

struct alignas(128) TensorMap {  // as CUtensorMap since CUDA 13; 64 before
  static constexpr uint32_t kMagic = 0x7E450A11;
  uint64_t base;
  uint64_t dim[5];           // innermost first
  uint64_t stride_bytes[5];  // of dimension 0 this is the element size
  uint16_t box[5];
  uint8_t rank;
  uint8_t element;  // emu::Element
  uint8_t element_bytes;
  uint8_t swizzle_bytes;  // 0, 32, 64 or 128
  uint32_t magic;
};
static_assert(sizeof(TensorMap) == 128, "as large as a CUtensorMap");

// Null, or why the driver would refuse. `stride_bytes` starts at dimension 1, as in cuTensorMapEncodeTiled.
const char* encode_tensor_map(TensorMap& map, int element, int element_bytes, void* base, int rank, const uint64_t* dim,
                              const uint64_t* stride_bytes, const uint32_t* box, int swizzle_bytes);

}  // namespace fastattn::emu
