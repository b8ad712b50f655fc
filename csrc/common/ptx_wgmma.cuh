// wgmma.mma_async of compute capability 9.0 (PTX ISA, "Asynchronous warpgroup level matrix instructions"): products of
// whole tiles, D (64 x N) += A (64 x K) B (K x N), carried out by the four warps of a warpgroup. N is a multiple of 16
// up to 256. Warp w of the four holds rows 16 w to 16 w + 15 of D, in N / 8 fragments laid out as mma.m16n8's d
// (ptx.cuh).
//
// The order of things: wgmma_fence, one or more products, wgmma_commit_group, ..., wgmma_wait_group. In between, the
// accumulators, the registers of A and the tiles in shared memory belong to the hardware.
#pragma once

#include "common/ptx_sm90.cuh"

namespace fastattn {

// ---- tiles in shared memory

// Which index runs along the contiguous direction of a tile: k, or the row of A / the column of B.
enum class Major : int { kK = 0, kMN = 1 };

// "Matrix descriptor format". A swizzle of s bytes arranges a tile in lines of s bytes, 8 lines to a pattern:
//   K-major    a line holds s bytes of k for one row; `stride_bytes` leads to the next 8 rows; `leading_bytes` is
//              unused.
//   MN-major   a line holds s / 2 rows for one k; `stride_bytes` leads to the next 8 k, `leading_bytes` to the next
//              s / 2 rows.
// Without swizzle lines are 16 bytes: K-major, `leading_bytes` leads to the next 16 bytes of k and `stride_bytes` to
// the next 8 rows; MN-major, `stride_bytes` leads to the next 8 rows and `leading_bytes` to the next 8 k. Steps of k
// inside a pattern are added to the address: 32 bytes for K-major.
FASTATTN_DEVICE uint64_t wgmma_descriptor(uint32_t tile_smem, uint32_t leading_bytes, uint32_t stride_bytes,
                                          Swizzle swizzle) {
  const uint64_t mode = swizzle == Swizzle::k128 ? 1 : swizzle == Swizzle::k64 ? 2 : swizzle == Swizzle::k32 ? 3 : 0;
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3FFFF) >> 4}; };
  return field(tile_smem) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | mode << 62;
}

// The descriptor of the tile that starts `bytes` later.
FASTATTN_DEVICE uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// ---- ordering

// Orders this warpgroup's accesses to accumulators and to registers of A before its next products. Needed before the
// first product, and again whenever other instructions have touched those registers.
FASTATTN_DEVICE void wgmma_fence(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::wgmma_fence({"wgmma.fence", caller});
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

FASTATTN_DEVICE void wgmma_commit_group(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::wgmma_commit_group({"wgmma.commit_group", caller});
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kGroups of the newest groups are in flight.
template <int kGroups>
FASTATTN_DEVICE void wgmma_wait_group(FASTATTN_CALLER) {
  static_assert(kGroups >= 0 && kGroups <= 7, "wgmma_wait_group: 0 to 7");
#if defined(FASTATTN_EMULATED)
  emu::wgmma_wait_group(kGroups, {"wgmma.wait_group", caller});
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// Keeps the compiler from moving uses of the accumulators across this point. Belongs after wgmma_wait_group.
template <typename Accumulator, int kRegisters>
FASTATTN_DEVICE void pin_accumulators([[maybe_unused]] Accumulator (&d)[kRegisters]) {
#if !defined(FASTATTN_EMULATED)
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (std::is_same_v<Accumulator, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
#endif
}

// ---- the instruction for each N. asm names its operands by number, so the text is put together from lists of
// registers.

#if !defined(FASTATTN_EMULATED)
namespace detail {

// clang-format off
#define FASTATTN_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTATTN_R8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_R16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FASTATTN_R24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_R32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_R40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_R48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_R56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_R64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FASTATTN_R72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FASTATTN_R80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_R88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_R96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FASTATTN_R104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FASTATTN_R112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FASTATTN_R120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_NAMES_8 FASTATTN_R0
#define FASTATTN_NAMES_16 FASTATTN_NAMES_8 ", " FASTATTN_R8
#define FASTATTN_NAMES_24 FASTATTN_NAMES_16 ", " FASTATTN_R16
#define FASTATTN_NAMES_32 FASTATTN_NAMES_24 ", " FASTATTN_R24
#define FASTATTN_NAMES_40 FASTATTN_NAMES_32 ", " FASTATTN_R32
#define FASTATTN_NAMES_48 FASTATTN_NAMES_40 ", " FASTATTN_R40
#define FASTATTN_NAMES_56 FASTATTN_NAMES_48 ", " FASTATTN_R48
#define FASTATTN_NAMES_64 FASTATTN_NAMES_56 ", " FASTATTN_R56
#define FASTATTN_NAMES_72 FASTATTN_NAMES_64 ", " FASTATTN_R64
#define FASTATTN_NAMES_80 FASTATTN_NAMES_72 ", " FASTATTN_R72
#define FASTATTN_NAMES_88 FASTATTN_NAMES_80 ", " FASTATTN_R80
#define FASTATTN_NAMES_96 FASTATTN_NAMES_88 ", " FASTATTN_R88
#define FASTATTN_NAMES_104 FASTATTN_NAMES_96 ", " FASTATTN_R96
#define FASTATTN_NAMES_112 FASTATTN_NAMES_104 ", " FASTATTN_R104
#define FASTATTN_NAMES_120 FASTATTN_NAMES_112 ", " FASTATTN_R112
#define FASTATTN_NAMES_128 FASTATTN_NAMES_120 ", " FASTATTN_R120
#define FASTATTN_EIGHT(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define FASTATTN_OPERANDS_8(c) FASTATTN_EIGHT(c, 0)
#define FASTATTN_OPERANDS_16(c) FASTATTN_OPERANDS_8(c), FASTATTN_EIGHT(c, 8)
#define FASTATTN_OPERANDS_24(c) FASTATTN_OPERANDS_16(c), FASTATTN_EIGHT(c, 16)
#define FASTATTN_OPERANDS_32(c) FASTATTN_OPERANDS_24(c), FASTATTN_EIGHT(c, 24)
#define FASTATTN_OPERANDS_40(c) FASTATTN_OPERANDS_32(c), FASTATTN_EIGHT(c, 32)
#define FASTATTN_OPERANDS_48(c) FASTATTN_OPERANDS_40(c), FASTATTN_EIGHT(c, 40)
#define FASTATTN_OPERANDS_56(c) FASTATTN_OPERANDS_48(c), FASTATTN_EIGHT(c, 48)
#define FASTATTN_OPERANDS_64(c) FASTATTN_OPERANDS_56(c), FASTATTN_EIGHT(c, 56)
#define FASTATTN_OPERANDS_72(c) FASTATTN_OPERANDS_64(c), FASTATTN_EIGHT(c, 64)
#define FASTATTN_OPERANDS_80(c) FASTATTN_OPERANDS_72(c), FASTATTN_EIGHT(c, 72)
#define FASTATTN_OPERANDS_88(c) FASTATTN_OPERANDS_80(c), FASTATTN_EIGHT(c, 80)
#define FASTATTN_OPERANDS_96(c) FASTATTN_OPERANDS_88(c), FASTATTN_EIGHT(c, 88)
#define FASTATTN_OPERANDS_104(c) FASTATTN_OPERANDS_96(c), FASTATTN_EIGHT(c, 96)
#define FASTATTN_OPERANDS_112(c) FASTATTN_OPERANDS_104(c), FASTATTN_EIGHT(c, 104)
#define FASTATTN_OPERANDS_120(c) FASTATTN_OPERANDS_112(c), FASTATTN_EIGHT(c, 112)
#define FASTATTN_OPERANDS_128(c) FASTATTN_OPERANDS_120(c), FASTATTN_EIGHT(c, 120)

// i0, i1, ... are the operands that follow the accumulators. 16-bit products end with the signs of A and B (kept) and,
// for operands in shared memory, whether they are MN-major; 8-bit products are always K-major.
#define FASTATTN_WGMMA_SS(name, shape, types, registers, i0, i1, i2, i3, i4)                                           \
  template <int kTransA, int kTransB>                                                                                  \
  FASTATTN_DEVICE static void name(float (&d)[registers], uint64_t a, uint64_t b, int accumulate) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned." shape "k16." types " {" FASTATTN_NAMES_##registers "}, "              \
                 i0 ", " i1 ", p, 1, 1, " i3 ", " i4 ";\n}"                                                            \
                 : FASTATTN_OPERANDS_##registers("+f")                                                                 \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB)                                         \
                 : "memory");                                                                                          \
  }
#define FASTATTN_WGMMA_RS(name, shape, types, registers, i0, i1, i2, i3, i4, i5, i6)                                   \
  template <int kTransB>                                                                                               \
  FASTATTN_DEVICE static void name(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, int accumulate) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned." shape "k16." types " {" FASTATTN_NAMES_##registers "}, "              \
                 "{" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, 1, 1, " i6 ";\n}"                                       \
                 : FASTATTN_OPERANDS_##registers("+f")                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB)                   \
                 : "memory");                                                                                          \
  }
#define FASTATTN_WGMMA_S8(shape, registers, i0, i1, i2, i3, i4, i5)                                                    \
  FASTATTN_DEVICE static void s8(int32_t (&d)[registers], uint64_t a, uint64_t b, int accumulate) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned." shape "k32.s32.s8.s8 {" FASTATTN_NAMES_##registers "}, "              \
                 i0 ", " i1 ", p;\n}"                                                                                  \
                 : FASTATTN_OPERANDS_##registers("+r")                                                                 \
                 : "l"(a), "l"(b), "r"(accumulate)                                                                     \
                 : "memory");                                                                                          \
  }                                                                                                                    \
  FASTATTN_DEVICE static void s8(int32_t (&d)[registers], const uint32_t (&a)[4], uint64_t b, int accumulate) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned." shape "k32.s32.s8.s8 {" FASTATTN_NAMES_##registers "}, "              \
                 "{" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p;\n}"                                                     \
                 : FASTATTN_OPERANDS_##registers("+r")                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)                                 \
                 : "memory");                                                                                          \
  }

template <int kN>
struct Wgmma;

#define FASTATTN_WGMMA(n, registers, i0, i1, i2, i3, i4, i5, i6)                                                       \
  template <>                                                                                                          \
  struct Wgmma<n> {                                                                                                    \
    FASTATTN_WGMMA_SS(f16, "m64n" #n, "f32.f16.f16", registers, i0, i1, i2, i3, i4)                                    \
    FASTATTN_WGMMA_SS(bf16, "m64n" #n, "f32.bf16.bf16", registers, i0, i1, i2, i3, i4)                                 \
    FASTATTN_WGMMA_RS(f16, "m64n" #n, "f32.f16.f16", registers, i0, i1, i2, i3, i4, i5, i6)                            \
    FASTATTN_WGMMA_RS(bf16, "m64n" #n, "f32.bf16.bf16", registers, i0, i1, i2, i3, i4, i5, i6)                         \
    FASTATTN_WGMMA_S8("m64n" #n, registers, i0, i1, i2, i3, i4, i5)                                                    \
  };
FASTATTN_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
FASTATTN_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
FASTATTN_WGMMA(48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
FASTATTN_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FASTATTN_WGMMA(80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
FASTATTN_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
FASTATTN_WGMMA(112, 56, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
FASTATTN_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
FASTATTN_WGMMA(144, 72, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
FASTATTN_WGMMA(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
FASTATTN_WGMMA(176, 88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
FASTATTN_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
FASTATTN_WGMMA(208, 104, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
FASTATTN_WGMMA(224, 112, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
FASTATTN_WGMMA(240, 120, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
FASTATTN_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
// clang-format on

#undef FASTATTN_WGMMA
#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_WGMMA_S8

}  // namespace detail
#endif

// ---- products. `accumulate` false starts a sum anew: D = A B.

// 16-bit elements (half_t or bfloat16_t), K = 16, A and B in shared memory.
template <typename Element, Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kRegisters>
FASTATTN_DEVICE void wgmma_m64k16(float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor,
                                  bool accumulate FASTATTN_AND_CALLER) {
  static_assert(std::is_same_v<Element, half_t> || std::is_same_v<Element, bfloat16_t>, "wgmma: fp16 or bf16");
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "wgmma: N is a multiple of 16 up to 256");
  constexpr bool kIsHalf = std::is_same_v<Element, half_t>;
#if defined(FASTATTN_EMULATED)
  const emu::Element element = kIsHalf ? emu::Element::kFloat16 : emu::Element::kBFloat16;
  emu::wgmma_mma_async(d,
                       {element, 2 * kRegisters, kMajorA == Major::kMN, kMajorB == Major::kMN, nullptr, a_descriptor,
                        b_descriptor, accumulate},
                       {"wgmma.mma_async", caller});
#else
  constexpr int kTransA = static_cast<int>(kMajorA), kTransB = static_cast<int>(kMajorB);
  if constexpr (kIsHalf) {
    detail::Wgmma<2 * kRegisters>::template f16<kTransA, kTransB>(d, a_descriptor, b_descriptor, accumulate);
  } else {
    detail::Wgmma<2 * kRegisters>::template bf16<kTransA, kTransB>(d, a_descriptor, b_descriptor, accumulate);
  }
#endif
}

// 16-bit elements, K = 16, A in registers: each warp its 16 rows, laid out as mma.m16n8k16's a.
template <typename Element, Major kMajorB = Major::kK, int kRegisters>
FASTATTN_DEVICE void wgmma_m64k16(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor,
                                  bool accumulate FASTATTN_AND_CALLER) {
  static_assert(std::is_same_v<Element, half_t> || std::is_same_v<Element, bfloat16_t>, "wgmma: fp16 or bf16");
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "wgmma: N is a multiple of 16 up to 256");
  constexpr bool kIsHalf = std::is_same_v<Element, half_t>;
#if defined(FASTATTN_EMULATED)
  const emu::Element element = kIsHalf ? emu::Element::kFloat16 : emu::Element::kBFloat16;
  emu::wgmma_mma_async(d, {element, 2 * kRegisters, false, kMajorB == Major::kMN, a, 0, b_descriptor, accumulate},
                       {"wgmma.mma_async", caller});
#else
  constexpr int kTransB = static_cast<int>(kMajorB);
  if constexpr (kIsHalf) {
    detail::Wgmma<2 * kRegisters>::template f16<kTransB>(d, a, b_descriptor, accumulate);
  } else {
    detail::Wgmma<2 * kRegisters>::template bf16<kTransB>(d, a, b_descriptor, accumulate);
  }
#endif
}

// int8, K = 32, both K-major; A in shared memory or in registers (as mma.m16n8k32's a).
template <int kRegisters>
FASTATTN_DEVICE void wgmma_m64k32_s8(int32_t (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor,
                                     bool accumulate FASTATTN_AND_CALLER) {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "wgmma: N is a multiple of 16 up to 256");
#if defined(FASTATTN_EMULATED)
  emu::wgmma_mma_async(
      d, {emu::Element::kInt8, 2 * kRegisters, false, false, nullptr, a_descriptor, b_descriptor, accumulate},
      {"wgmma.mma_async.s8", caller});
#else
  detail::Wgmma<2 * kRegisters>::s8(d, a_descriptor, b_descriptor, accumulate);
#endif
}

template <int kRegisters>
FASTATTN_DEVICE void wgmma_m64k32_s8(int32_t (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor,
                                     bool accumulate FASTATTN_AND_CALLER) {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "wgmma: N is a multiple of 16 up to 256");
#if defined(FASTATTN_EMULATED)
  emu::wgmma_mma_async(d, {emu::Element::kInt8, 2 * kRegisters, false, false, a, 0, b_descriptor, accumulate},
                       {"wgmma.mma_async.s8", caller});
#else
  detail::Wgmma<2 * kRegisters>::s8(d, a, b_descriptor, accumulate);
#endif
}

}  // namespace fastattn
