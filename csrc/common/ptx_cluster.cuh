// PTX instructions for clusters of blocks, compute capability 9.0: see ptx.cuh for the conventions. Blocks of a cluster
// (launch_clusters) run at the same time and reach each other's shared memory.
//
// The order of things: cluster_arrive and cluster_wait, before which nobody knows that the other blocks have started;
// accesses to their memory; and no block exits while others may still access its own.
#pragma once

#include "common/ptx_sm90.cuh"

namespace fastattn {

// ---- "Special registers: %cluster_ctarank, %cluster_nctarank"

FASTATTN_DEVICE uint32_t cluster_rank() {
#if defined(FASTATTN_EMULATED)
  return emu::cluster_rank();
#else
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

FASTATTN_DEVICE uint32_t cluster_blocks() {
#if defined(FASTATTN_EMULATED)
  return emu::cluster_blocks();
#else
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#endif
}

// ---- "barrier.cluster": every thread of the cluster that has not exited arrives, and waits before it arrives again.
// What was stored before an arrival is visible after the wait.

FASTATTN_DEVICE void cluster_arrive(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::cluster_arrive(true, {"barrier.cluster.arrive", caller});
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Faster, and publishes nothing. With fence_mbarrier_init in front it makes a block and its mbarriers known.
FASTATTN_DEVICE void cluster_arrive_relaxed(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::cluster_arrive(false, {"barrier.cluster.arrive.relaxed", caller});
#else
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

FASTATTN_DEVICE void cluster_wait(FASTATTN_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::cluster_wait({"barrier.cluster.wait", caller});
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// ---- other blocks' shared memory. Addresses are those of shared::cluster: this block's own shared addresses, or
// another's by cluster_address.

// "mapa": where block `rank` of the cluster has what this block has at `address_smem`.
FASTATTN_DEVICE uint32_t cluster_address(uint32_t address_smem, uint32_t rank FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  return emu::map_shared_rank(address_smem, rank, {"mapa", caller});
#else
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address_smem), "r"(rank));
  return address;
#endif
}

// "ld": 4, 8 or 16 bytes, as which kWords registers arrive.
template <int kWords>
FASTATTN_DEVICE void load_cluster(uint32_t (&value)[kWords], uint32_t address FASTATTN_AND_CALLER) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "load_cluster: 4, 8 or 16 bytes");
#if defined(FASTATTN_EMULATED)
  emu::load_cluster(value, address, sizeof value, {"ld.shared::cluster", caller});
#else
  if constexpr (kWords == 1) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value[0]) : "r"(address) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value[0]), "=r"(value[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// "st".
template <int kWords>
FASTATTN_DEVICE void store_cluster(uint32_t address, const uint32_t (&value)[kWords] FASTATTN_AND_CALLER) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "store_cluster: 4, 8 or 16 bytes");
#if defined(FASTATTN_EMULATED)
  emu::store_cluster(address, value, sizeof value, {"st.shared::cluster", caller});
#else
  if constexpr (kWords == 1) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value[0]) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value[0]), "r"(value[1]) : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
  }
#endif
}

// "st.async": the value travels by itself and completes its size in bytes at `barrier`, an mbarrier of the block that
// it goes to. Whoever waits there for the phase sees it.
template <int kWords>
FASTATTN_DEVICE void store_async(uint32_t address, const uint32_t (&value)[kWords],
                                 uint32_t barrier FASTATTN_AND_CALLER) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "store_async: 4, 8 or 16 bytes");
#if defined(FASTATTN_EMULATED)
  emu::store_async(address, value, sizeof value, barrier, {"st.async", caller});
#else
  if constexpr (kWords == 1) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
                 "r"(value[0]), "r"(barrier)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "r"(value[0]), "r"(value[1]), "r"(barrier)
                 : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
        "r"(value[0]), "r"(value[1]), "r"(value[2]), "r"(value[3]), "r"(barrier)
        : "memory");
  }
#endif
}

// ---- mbarriers across the cluster

// Arrives at an mbarrier of any block; orders this thread's accesses before it for whoever waits with
// mbarrier_wait_cluster.
FASTATTN_DEVICE void mbarrier_arrive_cluster(uint32_t barrier FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_arrive_cluster(barrier, {"mbarrier.arrive.shared::cluster", caller});
#else
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// mbarrier_wait for a barrier of this block at which other blocks arrive or complete bytes.
FASTATTN_DEVICE void mbarrier_wait_cluster(uint64_t* barrier_smem, int parity FASTATTN_AND_CALLER) {
#if defined(FASTATTN_EMULATED)
  emu::mbarrier_wait_parity(smem_address(barrier_smem, caller), parity, {"mbarrier.try_wait.parity.cluster", caller});
#else
  asm volatile(
      "{\n"
      ".reg .pred completed;\n"
      "try_again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 completed, [%0], %1;\n"
      "@!completed bra try_again;\n"
      "}" ::"r"(smem_address(barrier_smem)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace fastattn
