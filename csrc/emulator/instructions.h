// What common/ptx*.cuh calls in an emulated build: one function for each PTX instruction or family of instructions.
// `site` names the instruction and the kernel line, for error messages.
#pragma once

#include <cmath>

#include "emulator/cuda.h"
#include "emulator/tensor_map.h"

namespace fastattn::emu {

enum class Element : int { kFloat16, kBFloat16, kFloat32, kInt8, kInt32 };

// 32-bit shared address of a pointer, which must lie in the block's shared memory.
uint32_t shared_address(const void* pointer, Site site);

// ---- accesses to memory of several bytes at once, which fault on a device where they are not aligned
[[noreturn]] void misaligned(const void* pointer, int bytes, const Site& site);
inline void check_alignment(const void* pointer, int bytes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) != 0) misaligned(pointer, bytes, site);
}

inline float flush_denormal(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// ---- approximate.cpp
float ex2_approx(float x);
float lg2_approx(float x);
float rcp_approx(float x);
float tanh_approx(float x);
float div_full(float a, float b);

// ---- barriers
void bar_sync(int id, int threads, Site site);
void bar_arrive(int id, int threads, Site site);

// ---- turns.cpp
void wait_for_value(const int* counter, int value, Site site);
void release_add(int* counter, int value, Site site);

// ---- registers.cpp. Of a thread.
void setmaxnreg_dec(int registers, Site site);
void setmaxnreg_inc(int registers, Site site);

// ---- warp.cpp, mma.cpp
void ldmatrix(uint32_t* destination, int matrices, bool transposed, uint32_t row_address, Site site);
void stmatrix(uint32_t row_address, const uint32_t* source, int matrices, bool transposed, Site site);
void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b, Site site);
bool elect_sync(uint32_t mask, Site site);

// ---- cp_async.cpp
void cp_async(uint32_t destination, const void* source, int bytes, int valid_bytes, Site site);
void cp_async_commit_group();
void cp_async_wait_group(int groups_in_flight);
void cp_async_mbarrier_arrive_noinc(uint32_t barrier, Site site);

// ---- mbarrier.cpp
void mbarrier_init(uint32_t barrier, int count, Site site);
void mbarrier_inval(uint32_t barrier, Site site);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, int arrivals, int64_t transaction_bytes, Site site);
void mbarrier_wait_parity(uint32_t barrier, int parity, Site site);

// ---- cluster.cpp. Addresses in shared::cluster: the block's own, or those of map_shared_rank.
uint32_t cluster_rank();
uint32_t cluster_blocks();
void cluster_arrive(bool releases, Site site);
void cluster_wait(Site site);
uint32_t map_shared_rank(uint32_t address, uint32_t rank, Site site);
void load_cluster(void* destination, uint32_t address, size_t bytes, Site site);
void store_cluster(uint32_t address, const void* source, size_t bytes, Site site);
void store_async(uint32_t address, const void* source, size_t bytes, uint32_t barrier, Site site);
void mbarrier_arrive_cluster(uint32_t barrier, Site site);

// ---- tma.cpp. Coordinates: innermost dimension first, as many as the map has dimensions.
void fence_proxy_async();
void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier, const int32_t* coordinates, int rank,
              Site site);
void tma_store(const TensorMap& map, uint32_t source, const int32_t* coordinates, int rank, bool adds, Site site);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, Site site);
void bulk_store(void* destination, uint32_t source, uint32_t bytes, Site site);
void bulk_add(void* destination, uint32_t source, uint32_t bytes, Element element, Site site);
void bulk_commit_group();
void bulk_wait_group(int groups_in_flight, bool only_read, Site site);

// ---- wgmma.cpp
struct WgmmaOperands {
  Element element;              // of A and B
  int n;                        // columns of D
  bool a_is_transposed;         // A is M-major in shared memory
  bool b_is_transposed;         // B is N-major in shared memory
  const uint32_t* a_registers;  // null: A is read through a_descriptor
  uint64_t a_descriptor;
  uint64_t b_descriptor;
  bool accumulates;      // D += A B, else D = A B
  bool at_once = false;  // of PTX, whose registers have no address that a late result could go to
};
void wgmma_fence(Site site);
void wgmma_mma_async(void* d, const WgmmaOperands& operands, Site site);
void wgmma_commit_group(Site site);
void wgmma_wait_group(int groups_in_flight, Site site);

}  // namespace fastattn::emu
