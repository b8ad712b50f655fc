// What PTX that tests/ptx_to_cpp.py has turned into C++ is made of: one function for each instruction that concerns a
// thread alone. Registers are unsigned integers that hold bits; as<T> reads them, put writes them.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu::compiled {

inline ThreadView& view() { return *current_view; }
inline uint32_t lane() { return static_cast<uint32_t>(current_thread().lane); }

#define at(name, line) at_line(name, FASTATTN_COMPILED_FILE, line)
inline Site at_line(const char* name, const char* file, unsigned line) {
  Site site;
  site.op = name, site.file = file, site.line = line;
  return site;
}

// ---- registers

template <size_t kBytes>
using Bits =
    std::conditional_t<kBytes == 1, uint8_t,
                       std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

template <typename T, typename Register>
T as(Register bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(bits));
  } else {
    return static_cast<T>(bits);
  }
}

// Integers narrower than the register are extended by their own sign.
template <typename Register, typename T>
void put(Register& bits, T value) {
  if constexpr (std::is_integral_v<T>) {
    bits = static_cast<Register>(value);
  } else {
    bits = static_cast<Register>(std::bit_cast<Bits<sizeof(T)>>(value));
  }
}

// ---- integers wrap

template <typename T, typename Fn>
T wrapped(Fn&& fn, T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(fn(static_cast<U>(a), static_cast<U>(b)));
}

template <typename T>
T op_add(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a + b;
  else
    return wrapped([](auto x, auto y) { return x + y; }, a, b);
}
template <typename T>
T op_sub(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a - b;
  else
    return wrapped([](auto x, auto y) { return x - y; }, a, b);
}
template <typename T>
T op_mul(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a * b;
  else
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T op_neg(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return -a;
  else
    return op_sub(T{0}, a);
}
template <typename T>
T op_abs(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fabs(a);
  else
    return a < 0 ? op_neg(a) : a;
}
// Of a number and NaN, the number.
template <typename T>
T op_min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(a, b);
  else
    return a < b ? a : b;
}
template <typename T>
T op_max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(a, b);
  else
    return a < b ? b : a;
}
// A division of integers by zero has an unspecified result, and may have been moved to where it is not used.
template <typename T>
T op_div(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a / b;
  else
    return b == 0 ? static_cast<T>(-1) : std::is_signed_v<T> && b == static_cast<T>(-1) ? op_neg(a) : a / b;
}
template <typename T>
T op_rem(T a, T b) {
  return b == 0 ? static_cast<T>(-1) : std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : a % b;
}
template <typename T>
T op_and(T a, T b) {
  return a & b;
}
template <typename T>
T op_or(T a, T b) {
  return a | b;
}
template <typename T>
T op_xor(T a, T b) {
  return a ^ b;
}
template <typename T>
T op_not(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return static_cast<T>(~a);
}
// Amounts beyond the width give zeros, or copies of the sign.
template <typename T>
T op_shl(T a, uint32_t amount) {
  return amount >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << amount);
}
template <typename T>
T op_shr(T a, uint32_t amount) {
  if (amount >= 8 * sizeof(T)) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> amount);
}
template <typename T>
T op_brev(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
  return result;
}
template <typename T>
uint32_t op_popc(T a) {
  return static_cast<uint32_t>(std::popcount(a));
}
template <typename T>
T op_bfi(T field, T base, T position, T length) {
  const uint32_t at_bit = position & 0xFF, bits = length & 0xFF;
  if (at_bit >= 8 * sizeof(T)) return base;
  const T mask = op_shl(static_cast<T>(op_shl(T{1}, bits) - 1), at_bit);
  return static_cast<T>((base & ~mask) | (op_shl(field, at_bit) & mask));
}
template <typename T>
T op_bfe(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kTop = 8 * sizeof(T) - 1;
  position &= 0xFF, length &= 0xFF;
  const bool sign = std::is_signed_v<T> && length > 0 && (a >> std::min(position + length - 1, kTop) & 1) != 0;
  std::make_unsigned_t<T> result = 0;
  for (uint32_t i = 0; i <= kTop; ++i) {
    const bool bit = i < length && position + i <= kTop ? (a >> (position + i) & 1) != 0 : sign;
    result |= std::make_unsigned_t<T>{bit} << i;
  }
  return static_cast<T>(result);
}
inline uint32_t bfind_shiftamt(uint32_t a) { return a == 0 ? 0xFFFFFFFFu : static_cast<uint32_t>(std::countl_zero(a)); }
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t control = selector >> (4 * i) & 0xF;
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (control & 7)));
    result |= uint32_t{control & 8 ? static_cast<uint8_t>(static_cast<int8_t>(byte) >> 7) : byte} << (8 * i);
  }
  return result;
}
template <typename Wide, typename T>
T high_product(T a, T b) {
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}
inline int32_t max_relu(int32_t a, int32_t b) { return std::max({a, b, 0}); }
inline int32_t dp4a(int32_t a, int32_t b, int32_t sum) { return __dp4a(a, b, sum); }

// ---- floating point

template <typename T>
T op_fma_rn(T a, T b, T c) {
  return std::fma(a, b, c);
}
// Rounded towards minus infinity. The product is exact in double, and so is the sum where it is used: with a c that is
// larger than the product, in exp and the like.
template <typename T>
T op_fma_rm(T a, T b, T c) {
  static_assert(std::is_same_v<T, float>);
  const double exact = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c);
  const float nearest = static_cast<float>(exact);
  return static_cast<double>(nearest) > exact ? std::nextafter(nearest, -std::numeric_limits<float>::infinity())
                                              : nearest;
}
template <typename T>
T op_rcp(T a) {
  return T{1} / a;
}
template <typename T>
T op_sqrt(T a) {
  return std::sqrt(a);
}
template <typename T>
T op_rni(T a) {
  return std::nearbyint(a);
}
template <typename T>
T op_rzi(T a) {
  return std::trunc(a);
}
inline float ex2_approx_of_denormals(float a) { return a < -126.0f ? std::exp2(a) : ex2_approx(a); }
inline float saturate(float a) { return std::isnan(a) ? 0.0f : std::fmin(std::fmax(a, 0.0f), 1.0f); }
template <typename T, typename F>
T to_integer(F whole) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(whole)) return 0;
  if (static_cast<long double>(whole) <= static_cast<long double>(Limits::min())) return Limits::min();
  if (static_cast<long double>(whole) >= static_cast<long double>(Limits::max())) return Limits::max();
  return static_cast<T>(whole);
}
// Rounded to odd, so that rounding it again, to 16 bits, rounds it once.
inline float fma_for_16_bits(float a, float b, float c) {
  const double exact = std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
  const float nearest = static_cast<float>(exact);
  const bool is_odd = (std::bit_cast<uint32_t>(nearest) & 1) != 0;
  if (is_odd || static_cast<double>(nearest) == exact || !std::isfinite(nearest)) return nearest;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return std::nextafter(nearest, static_cast<double>(nearest) < exact ? kInfinity : -kInfinity);
}
inline float half_to_float(uint16_t bits) { return __half2float(std::bit_cast<__half>(bits)); }
inline float bfloat16_to_float(uint16_t bits) { return __bfloat162float(std::bit_cast<__nv_bfloat16>(bits)); }
inline __half add_half(uint16_t a, uint16_t b) { return __float2half_rn(half_to_float(a) + half_to_float(b)); }
inline __nv_bfloat16 add_bfloat16(uint16_t a, uint16_t b) {
  return __float2bfloat16_rn(bfloat16_to_float(a) + bfloat16_to_float(b));
}
// Of pairs, each by itself.
template <auto add>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const auto low = std::bit_cast<uint16_t>(add(static_cast<uint16_t>(a), static_cast<uint16_t>(b)));
  const auto high = std::bit_cast<uint16_t>(add(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16)));
  return uint32_t{high} << 16 | low;
}
inline __half fma_half(uint16_t a, uint16_t b, uint16_t c) {
  return __float2half_rn(fma_for_16_bits(half_to_float(a), half_to_float(b), half_to_float(c)));
}
inline __nv_bfloat16 fma_bfloat16(uint16_t a, uint16_t b, uint16_t c) {
  return __float2bfloat16_rn(fma_for_16_bits(bfloat16_to_float(a), bfloat16_to_float(b), bfloat16_to_float(c)));
}

// ---- comparisons; those with a u are true of NaN, of the others only nan is

#define FASTATTN_COMPARISON(name, expression) \
  template <typename T>                       \
  bool compare_##name(T a, T b) {             \
    return expression;                        \
  }
FASTATTN_COMPARISON(eq, a == b)
FASTATTN_COMPARISON(ne, a<b || a> b)
FASTATTN_COMPARISON(lt, a < b)
FASTATTN_COMPARISON(le, a <= b)
FASTATTN_COMPARISON(gt, a > b)
FASTATTN_COMPARISON(ge, a >= b)
FASTATTN_COMPARISON(equ, !(a < b || a > b))
FASTATTN_COMPARISON(neu, a != b)
FASTATTN_COMPARISON(ltu, !(a >= b))
FASTATTN_COMPARISON(leu, !(a > b))
FASTATTN_COMPARISON(gtu, !(a <= b))
FASTATTN_COMPARISON(geu, !(a < b))
FASTATTN_COMPARISON(nan, std::isnan(a) || std::isnan(b))
FASTATTN_COMPARISON(num, !std::isnan(a) && !std::isnan(b))
#undef FASTATTN_COMPARISON

// ---- memory

inline uint64_t static_address(const void* key, size_t bytes, size_t alignment, Site site) {
  return shared_address(static_shared(key, bytes, alignment, site), site);
}
inline uint64_t dynamic_address() { return kSharedBase + kStaticSharedBytes; }
inline uint64_t generic_address(uint64_t shared, const Site& site) {
  return reinterpret_cast<uint64_t>(shared_pointer(static_cast<uint32_t>(shared), 0, 1, site));
}
inline uint64_t to_shared(uint64_t generic, const Site& site) {
  return shared_address(reinterpret_cast<const void*>(generic), site);
}
inline uint8_t* aligned(uint8_t* pointer, size_t bytes, const Site& site) {
  check_alignment(pointer, static_cast<int>(bytes), site);
  return pointer;
}
inline int32_t load_acquire(uint8_t* pointer) {
  return std::atomic_ref<int32_t>(*reinterpret_cast<int32_t*>(pointer)).load(std::memory_order_acquire);
}
// The last operand of a shuffle holds the bound and, from bit 8 on, the mask of the segments.
inline uint32_t shfl(Shuffle kind, uint32_t mask, uint32_t value, uint32_t operand, uint32_t bounds, Site site) {
  if ((bounds & 31) != (kind == Shuffle::kUp ? 0u : 31u)) fail(site, "a bound of %u", bounds & 31);
  return shuffle(kind, mask, value, static_cast<int>(operand), 32 - static_cast<int>(bounds >> 8 & 31), site);
}
// Of a whole warp.
template <typename T, typename Fn>
T redux(uint32_t mask, T value, Fn fn, Site site) {
  if (mask != 0xFFFFFFFFu) fail(site, "of the lanes %x; a whole warp is known", mask);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fn(value, as<T>(shuffle(Shuffle::kXor, mask, static_cast<uint32_t>(value), distance, kWarpSize, site)));
  }
  return value;
}

}  // namespace fastattn::emu::compiled
