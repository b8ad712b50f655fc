// PTX instructions of compute capability 8.0, one function each; ptx_sm90.cuh and ptx_wgmma.cuh hold those of 9.0.
// There is no other asm in the project. Each function has two bodies: the instruction, and the emulator's model of it.
// The name in quotes is the section of the PTX ISA manual.
//
// Vocabulary: `lane` is threadIdx.x % 32, g = lane / 4, t = lane % 4. Shared memory is named by 32-bit addresses.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

namespace fastattn {

// "cvta": the 32-bit shared address of a pointer to shared memory.
FASTATTN_DEVICE uint32_t smem_address(const void* pointer FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  return emu::shared_address(pointer, {"smem_address", caller});
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// The same number, of which the compiler knows nothing: what is made of it is not computed ahead of a loop and kept.
FASTATTN_DEVICE int opaque(int number) {
#if !defined(FASTATTN_EMULATED)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// ---- named barriers, "bar, barrier". Barrier 0 is the one of __syncthreads. `threads` counts all that sync or arrive,
// in whole warps.

FASTATTN_DEVICE void bar_sync(int id, int threads FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bar_sync(id, threads, {"bar.sync", caller});
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

FASTATTN_DEVICE void bar_arrive(int id, int threads FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bar_arrive(id, threads, {"bar.arrive", caller});
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- asynchronous copies of one thread, "cp.async". Global and shared address are aligned to kBytes.

// Copies the first `valid_bytes` (0 to kBytes) of kBytes (4, 8 or 16) and writes zeros for the others, which are not
// read. 16 bytes bypass L1.
template <int kBytes>
FASTATTN_DEVICE void cp_async_zero_fill(uint32_t dst_smem, const void* src_gmem, int valid_bytes FASTATTN_AND_CALLER) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(FASTATTN_EMULATED)
  emu::cp_async(dst_smem, src_gmem, kBytes, valid_bytes, {"cp.async", caller});
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst_smem), "l"(src_gmem), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst_smem), "l"(src_gmem), "n"(kBytes),
                 "r"(valid_bytes)
                 : "memory");
  }
#endif
}

// All of them, or none if not `valid`.
template <int kBytes>
FASTATTN_DEVICE void cp_async(uint32_t dst_smem, const void* src_gmem, bool valid = true FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  cp_async_zero_fill<kBytes>(dst_smem, src_gmem, valid ? kBytes : 0, caller);
#else
  cp_async_zero_fill<kBytes>(dst_smem, src_gmem, valid ? kBytes : 0);
#endif
}

// Closes a group of this thread's copies, "cp.async.commit_group".
FASTATTN_DEVICE void cp_async_commit_group() {
#if defined(FASTATTN_EMULATED)
  emu::cp_async_commit_group();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's newest groups are in flight, "cp.async.wait_group". Other threads see
// the data only after a barrier.
template <int kGroups>
FASTATTN_DEVICE void cp_async_wait_group() {
#if defined(FASTATTN_EMULATED)
  emu::cp_async_wait_group(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- 8 x 8 matrices of 16-bit elements, "ldmatrix". Lane 8 i + r gives the address of row r of matrix i. Register i
// receives elements (g, 2 t) and (g, 2 t + 1) of matrix i, or with _trans (2 t, g) and (2 t + 1, g).

FASTATTN_DEVICE void ldmatrix(uint32_t (&dst)[1], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 1, false, row_smem, {"ldmatrix", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(dst[0]) : "r"(row_smem) : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix(uint32_t (&dst)[2], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 2, false, row_smem, {"ldmatrix", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(dst[0]), "=r"(dst[1])
               : "r"(row_smem)
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix(uint32_t (&dst)[4], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 4, false, row_smem, {"ldmatrix", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(row_smem)
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_trans(uint32_t (&dst)[1], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 1, true, row_smem, {"ldmatrix.trans", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(dst[0]) : "r"(row_smem) : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_trans(uint32_t (&dst)[2], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 2, true, row_smem, {"ldmatrix.trans", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(dst[0]), "=r"(dst[1])
               : "r"(row_smem)
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_trans(uint32_t (&dst)[4], uint32_t row_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::ldmatrix(dst, 4, true, row_smem, {"ldmatrix.trans", caller});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(row_smem)
               : "memory");
#endif
}

// ---- matrix products of a warp, "mma": d += a b, with a row-major and b column-major.

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8), both half_t or both bfloat16_t, two elements a register.
//   a[q]  row g + 8 (q % 2), columns 2 t + 8 (q / 2) and the next      (what ldmatrix x4 of a row-major tile gives)
//   b[q]  column g, rows 2 t + 8 q and the next                       (ldmatrix x2 of the column-major tile)
//   d[q]  row g + 8 (q / 2), column 2 t + q % 2
template <typename Element>
FASTATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTATTN_AND_CALLER) {
  static_assert(std::is_same_v<Element, half_t> || std::is_same_v<Element, bfloat16_t>, "mma.m16n8k16: fp16 or bf16");
#if defined(FASTATTN_EMULATED)
  constexpr auto kElement = std::is_same_v<Element, half_t> ? emu::Element::kFloat16 : emu::Element::kBFloat16;
  emu::mma_m16n8k16(kElement, d, a, b, {"mma.m16n8k16", caller});
#else
  if constexpr (std::is_same_v<Element, half_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d (16 x 8, int32) += a (16 x 32) b (32 x 8), int8, four elements a register: as above with 4 t for 2 t and 16 for 8
// in the columns of a and the rows of b. Sums that leave int32 wrap.
FASTATTN_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2] FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mma_m16n8k32_s8(d, a, b, {"mma.m16n8k32.s8", caller});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- approximate mathematics: about 2^-22 relative error (tanh 2^-11), denormals become 0

// "ex2": 2 to the power of x; -inf gives 0.
FASTATTN_DEVICE float ex2_approx(float x) {
#if defined(FASTATTN_EMULATED)
  return emu::ex2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// "lg2": logarithm to base 2; 0 gives -inf. Of a sum of 100 it may be off by 1.6e-6: log2f where that is too much.
FASTATTN_DEVICE float lg2_approx(float x) {
#if defined(FASTATTN_EMULATED)
  return emu::lg2_approx(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// "rcp": 1 / x.
FASTATTN_DEVICE float rcp_approx(float x) {
#if defined(FASTATTN_EMULATED)
  return emu::rcp_approx(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// "tanh".
FASTATTN_DEVICE float tanh_approx(float x) {
#if defined(FASTATTN_EMULATED)
  return emu::tanh_approx(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastattn
