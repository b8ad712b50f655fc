// PTX instructions of compute capability 9.0 other than wgmma: mbarriers, bulk copies, the asynchronous proxy. See
// ptx.cuh for the conventions. Kernels that use them are compiled for sm_90a.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.cuh"

namespace fastattn {

// ---- "mbarrier": an object of eight bytes in shared memory. A phase completes when the expected number of arrivals
// and all announced bytes have come; the phase's number modulo 2 is its parity. The first phase has parity 0.

FASTATTN_DEVICE void mbarrier_init(uint64_t* barrier_smem, int count FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_init(smem_address(barrier_smem, caller), count, {"mbarrier.init", caller});
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier_smem)), "r"(count) : "memory");
#endif
}

// Ends the life of an mbarrier, so that its memory can be used for other things, "mbarrier.inval".
FASTATTN_DEVICE void mbarrier_inval(uint64_t* barrier_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_inval(smem_address(barrier_smem, caller), {"mbarrier.inval", caller});
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_address(barrier_smem)) : "memory");
#endif
}

// Lets the asynchronous proxy see the barriers just initialised, "fence.mbarrier_init". Other threads of the block also
// need a __syncthreads.
FASTATTN_DEVICE void fence_mbarrier_init() {
#if defined(FASTATTN_EMULATED)
  emu::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

FASTATTN_DEVICE void mbarrier_arrive(uint64_t* barrier_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_arrive(smem_address(barrier_smem, caller), 1, 0, {"mbarrier.arrive", caller});
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier_smem)) : "memory");
#endif
}

// Announces `bytes` that bulk copies will bring in this phase, and arrives.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier_smem, uint32_t bytes FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_arrive(smem_address(barrier_smem, caller), 1, bytes, {"mbarrier.arrive.expect_tx", caller});
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier_smem)), "r"(bytes)
               : "memory");
#endif
}

// Announces `bytes` without arriving, "mbarrier.expect_tx".
FASTATTN_DEVICE void mbarrier_expect_tx(uint64_t* barrier_smem, uint32_t bytes FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_arrive(smem_address(barrier_smem, caller), 0, bytes, {"mbarrier.expect_tx", caller});
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier_smem)), "r"(bytes)
               : "memory");
#endif
}

// Waits for the completion of the phase with this parity, "mbarrier.try_wait". A fresh barrier counts as having
// completed a phase of parity 1.
FASTATTN_DEVICE void mbarrier_wait(uint64_t* barrier_smem, int parity FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_wait_parity(smem_address(barrier_smem, caller), parity, {"mbarrier.try_wait.parity", caller});
#else
  asm volatile(
      "{\n"
      ".reg .pred completed;\n"
      "try_again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 completed, [%0], %1;\n"
      "@!completed bra try_again;\n"
      "}" ::"r"(smem_address(barrier_smem)),
      "r"(parity)
      : "memory");
#endif
}

// Arrives, within the count given to init, once all of this thread's cp.async so far have landed,
// "cp.async.mbarrier.arrive".
FASTATTN_DEVICE void cp_async_mbarrier_arrive_noinc(uint64_t* barrier_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::cp_async_mbarrier_arrive_noinc(smem_address(barrier_smem, caller), {"cp.async.mbarrier.arrive.noinc", caller});
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier_smem)) : "memory");
#endif
}

// ---- proxies, "fence.proxy". Bulk copies and wgmma reach memory through the asynchronous proxy; ordinary stores to
// shared memory become visible to it by this fence, executed after them and before the synchronisation that leads
// there. So are ordinary loads ordered before a bulk copy that will write where they have read.

FASTATTN_DEVICE void fence_proxy_async() {
#if defined(FASTATTN_EMULATED)
  emu::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- tiles by tensor map, "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor". Issued by one thread. `at` is the
// position of the box in the tensor, innermost dimension first, and may lie partly or wholly outside of it. The map is
// a __grid_constant__ parameter of the kernel.

FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if defined(FASTATTN_EMULATED)
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

#if !defined(FASTATTN_EMULATED)
#define FASTATTN_TMA_LOAD(rank, coordinates, ...)                                                   \
  asm volatile("cp.async.bulk.tensor." rank                                                         \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
               "}], [%2];" ::"r"(dst),                                                              \
               "l"(map), "r"(barrier), __VA_ARGS__                                                  \
               : "memory")
#define FASTATTN_TMA_OUT(instruction, mode, rank, coordinates, ...)                                                  \
  asm volatile(instruction rank ".global.shared::cta." mode ".bulk_group [%0, {" coordinates "}], [%1];" ::"l"(map), \
               "r"(src), __VA_ARGS__                                                                                 \
               : "memory")
#define FASTATTN_TMA_OUT_OF_ANY_RANK(instruction, mode)                                                             \
  if constexpr (kRank == 1) {                                                                                       \
    FASTATTN_TMA_OUT(instruction, mode, "1d", "%2", "r"(at[0]));                                                    \
  } else if constexpr (kRank == 2) {                                                                                \
    FASTATTN_TMA_OUT(instruction, mode, "2d", "%2, %3", "r"(at[0]), "r"(at[1]));                                    \
  } else if constexpr (kRank == 3) {                                                                                \
    FASTATTN_TMA_OUT(instruction, mode, "3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));                    \
  } else if constexpr (kRank == 4) {                                                                                \
    FASTATTN_TMA_OUT(instruction, mode, "4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));    \
  } else {                                                                                                          \
    FASTATTN_TMA_OUT(instruction, mode, "5d", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), \
                     "r"(at[4]));                                                                                   \
  }
#endif

// Copies a box to shared memory and completes its full size in bytes, out-of-bounds elements included, at the mbarrier.
template <int kRank>
FASTATTN_DEVICE void tma_load(void* dst_smem, const TensorMap* map, uint64_t* barrier_smem,
                              const int32_t (&at)[kRank] FASTATTN_AND_CALLER) {
  static_assert(kRank >= 1 && kRank <= 5, "tma_load: 1 to 5 dimensions");
#if defined(FASTATTN_EMULATED)
  emu::tma_load(smem_address(dst_smem, caller), *map, smem_address(barrier_smem, caller), at, kRank,
                {"cp.async.bulk.tensor (load)", caller});
#else
  const uint32_t dst = smem_address(dst_smem), barrier = smem_address(barrier_smem);
  if constexpr (kRank == 1) {
    FASTATTN_TMA_LOAD("1d", "%3", "r"(at[0]));
  } else if constexpr (kRank == 2) {
    FASTATTN_TMA_LOAD("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
  } else if constexpr (kRank == 3) {
    FASTATTN_TMA_LOAD("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (kRank == 4) {
    FASTATTN_TMA_LOAD("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    FASTATTN_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#endif
}

// Copies a box from shared memory; part of the thread's open bulk group.
template <int kRank>
FASTATTN_DEVICE void tma_store(const TensorMap* map, const void* src_smem,
                               const int32_t (&at)[kRank] FASTATTN_AND_CALLER) {
  static_assert(kRank >= 1 && kRank <= 5, "tma_store: 1 to 5 dimensions");
#if defined(FASTATTN_EMULATED)
  emu::tma_store(*map, smem_address(src_smem, caller), at, kRank, false, {"cp.async.bulk.tensor (store)", caller});
#else
  const uint32_t src = smem_address(src_smem);
  FASTATTN_TMA_OUT_OF_ANY_RANK("cp.async.bulk.tensor.", "tile");
#endif
}

// Adds a box of shared memory to the tensor, element by element, atomically and in no fixed order.
template <int kRank>
FASTATTN_DEVICE void tma_reduce_add(const TensorMap* map, const void* src_smem,
                                    const int32_t (&at)[kRank] FASTATTN_AND_CALLER) {
  static_assert(kRank >= 1 && kRank <= 5, "tma_reduce_add: 1 to 5 dimensions");
#if defined(FASTATTN_EMULATED)
  emu::tma_store(*map, smem_address(src_smem, caller), at, kRank, true, {"cp.reduce.async.bulk.tensor", caller});
#else
  const uint32_t src = smem_address(src_smem);
  FASTATTN_TMA_OUT_OF_ANY_RANK("cp.reduce.async.bulk.tensor.", "add.tile");
#endif
}

// ---- contiguous bytes, "cp.async.bulk", "cp.reduce.async.bulk". Addresses and size are multiples of 16.

FASTATTN_DEVICE void bulk_load(void* dst_smem, const void* src_gmem, uint32_t bytes,
                               uint64_t* barrier_smem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bulk_load(smem_address(dst_smem, caller), src_gmem, bytes, smem_address(barrier_smem, caller),
                 {"cp.async.bulk (load)", caller});
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(dst_smem)),
               "l"(src_gmem), "r"(bytes), "r"(smem_address(barrier_smem))
               : "memory");
#endif
}

FASTATTN_DEVICE void bulk_store(void* dst_gmem, const void* src_smem, uint32_t bytes FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bulk_store(dst_gmem, smem_address(src_smem, caller), bytes, {"cp.async.bulk (store)", caller});
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst_gmem),
               "r"(smem_address(src_smem)), "r"(bytes)
               : "memory");
#endif
}

// Adds fp32 values of shared memory to global memory, atomically and in no fixed order.
FASTATTN_DEVICE void bulk_reduce_add(float* dst_gmem, const float* src_smem, uint32_t bytes FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bulk_add(dst_gmem, smem_address(src_smem, caller), bytes, emu::Element::kFloat32,
                {"cp.reduce.async.bulk", caller});
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst_gmem),
               "r"(smem_address(src_smem)), "r"(bytes)
               : "memory");
#endif
}

// ---- groups of this thread's stores and reductions, "cp.async.bulk.commit_group", "cp.async.bulk.wait_group"

FASTATTN_DEVICE void bulk_commit_group() {
#if defined(FASTATTN_EMULATED)
  emu::bulk_commit_group();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of the newest groups are in flight: all others are complete in global memory.
template <int kGroups>
FASTATTN_DEVICE void bulk_wait_group(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bulk_wait_group(kGroups, false, {"cp.async.bulk.wait_group", caller});
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// As above, but all others have only read their shared memory, which may then be written again.
template <int kGroups>
FASTATTN_DEVICE void bulk_wait_group_read(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::bulk_wait_group(kGroups, true, {"cp.async.bulk.wait_group.read", caller});
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- turns of blocks: a counter in global memory. A block may only wait for blocks with smaller indices, which have
// started before it.

// Waits until the counter holds `turn`. What bulk copies of the blocks before have done is then done for this thread's.
// More will do, too: who else counts here may depend on lengths that nobody has looked at, and a turn that was passed
// over would be waited for forever. The emulator refuses it where somebody has.
FASTATTN_DEVICE void wait_for_turn(const int* counter_gmem, int turn FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::wait_for_value(counter_gmem, turn, {"wait for a turn", caller});
#else
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter_gmem) : "memory");
  } while (value < turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Gives the turn to the next one. This thread's bulk copies must be complete in global memory.
FASTATTN_DEVICE void pass_turn(int* counter_gmem FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::release_add(counter_gmem, 1, {"pass a turn", caller});
#else
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter_gmem) : "memory");
#endif
}

// ---- warps and registers

// This thread's warp in the block. From lane 0, which tells the compiler that it is the same for all lanes: what is
// made of it, descriptors above all, then stays in uniform registers instead of going there before every product.
FASTATTN_DEVICE int warp_of_block() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0); }

// True for one lane of the warp, always the same one, "elect.sync".
FASTATTN_DEVICE bool elect_sync(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  return emu::elect_sync(0xFFFFFFFFu, {"elect.sync", caller});
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred is_leader;\n"
      "elect.sync _|is_leader, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, is_leader;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#endif
}

// Changes the registers each thread of a warpgroup may use, "setmaxnreg": a multiple of 8 from 24 to 256. All warps of
// the warpgroup execute it.
template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_inc(FASTATTN_CALLER) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg: 24 to 256, by 8");
#if defined(FASTATTN_EMULATED)
  emu::setmaxnreg_inc(kRegisters, {"setmaxnreg.inc", caller});
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_dec(FASTATTN_CALLER) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg: 24 to 256, by 8");
#if defined(FASTATTN_EMULATED)
  emu::setmaxnreg_dec(kRegisters, {"setmaxnreg.dec", caller});
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// The inverse of ldmatrix (ptx.cuh), "stmatrix": register i goes to matrix i, rows as given by lane 8 i + r.
FASTATTN_DEVICE void stmatrix(uint32_t row_smem, const uint32_t (&src)[2] FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::stmatrix(row_smem, src, 2, false, {"stmatrix", caller});
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row_smem), "r"(src[0]), "r"(src[1])
               : "memory");
#endif
}

FASTATTN_DEVICE void stmatrix(uint32_t row_smem, const uint32_t (&src)[4] FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::stmatrix(row_smem, src, 4, false, {"stmatrix", caller});
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_smem), "r"(src[0]),
               "r"(src[1]), "r"(src[2]), "r"(src[3])
               : "memory");
#endif
}

FASTATTN_DEVICE void stmatrix_trans(uint32_t row_smem, const uint32_t (&src)[2] FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::stmatrix(row_smem, src, 2, true, {"stmatrix.trans", caller});
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row_smem), "r"(src[0]),
               "r"(src[1])
               : "memory");
#endif
}

FASTATTN_DEVICE void stmatrix_trans(uint32_t row_smem, const uint32_t (&src)[4] FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::stmatrix(row_smem, src, 4, true, {"stmatrix.trans", caller});
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_smem), "r"(src[0]),
               "r"(src[1]), "r"(src[2]), "r"(src[3])
               : "memory");
#endif
}

#if !defined(FASTATTN_EMULATED)
#undef FASTATTN_TMA_LOAD
#undef FASTATTN_TMA_OUT
#undef FASTATTN_TMA_OUT_OF_ANY_RANK
#endif

}  // namespace fastattn
