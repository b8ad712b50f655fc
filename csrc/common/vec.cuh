// Conversions between fp32 and the element types of tensors, and 16-byte accesses to global memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda.cuh"

namespace fastattn {

FASTATTN_DEVICE float to_float(float value) { return value; }
FASTATTN_DEVICE float to_float(half_t value) { return __half2float(value); }
FASTATTN_DEVICE float to_float(bfloat16_t value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename Element>
FASTATTN_DEVICE Element from_float(float value) {
  if constexpr (std::is_same_v<Element, half_t>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Element, bfloat16_t>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<Element, float>, "from_float: float, half_t or bfloat16_t");
    return value;
  }
}

// Two values in one register, `low` in the low half: an mma operand.
template <typename Element>
FASTATTN_DEVICE uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<Element, half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    static_assert(std::is_same_v<Element, bfloat16_t>, "pack2: half_t or bfloat16_t");
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

template <typename Element>
FASTATTN_DEVICE float2 unpack2(uint32_t bits) {
  if constexpr (std::is_same_v<Element, half_t>) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __half22float2(pair);
  } else {
    static_assert(std::is_same_v<Element, bfloat16_t>, "unpack2: half_t or bfloat16_t");
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __bfloat1622float2(pair);
  }
}

// kCount elements that travel in one access of up to 16 bytes.
template <typename Element, int kCount_ = 16 / sizeof(Element)>
struct alignas(sizeof(Element) * kCount_) Vec {
  static constexpr int kCount = kCount_;
  static constexpr int kBytes = static_cast<int>(sizeof(Element)) * kCount_;
  static_assert(kBytes <= 16 && (kBytes & (kBytes - 1)) == 0, "Vec: 1, 2, 4, 8 or 16 bytes");
  Element value[kCount_];

  FASTATTN_DEVICE Element& operator[](int i) { return value[i]; }
  FASTATTN_DEVICE const Element& operator[](int i) const { return value[i]; }
};

// The pointer is aligned to the vector: a device faults elsewhere, and the emulator reports it.
template <int kCount, typename Element>
FASTATTN_DEVICE Vec<Element, kCount> load_vec(const Element* source FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::check_alignment(source, Vec<Element, kCount>::kBytes, {"load_vec", caller});
#endif
  return *reinterpret_cast<const Vec<Element, kCount>*>(source);
}

template <typename Element, int kCount>
FASTATTN_DEVICE void store_vec(Element* destination, const Vec<Element, kCount>& vec FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::check_alignment(destination, Vec<Element, kCount>::kBytes, {"store_vec", caller});
#endif
  *reinterpret_cast<Vec<Element, kCount>*>(destination) = vec;
}

}  // namespace fastattn
