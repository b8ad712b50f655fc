// CUDA when nvcc compiles this, the emulator (csrc/emulator) when a C++ compiler does with FASTATTN_EMULATED defined.
// Kernel sources include this and the headers next to it, never a CUDA header, and need no #if of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FASTATTN_EMULATED)

#include "emulator/instructions.h"

#define FASTATTN_DEVICE inline
// Last parameter of an instruction: the kernel line that error messages name.
#define FASTATTN_CALLER ::std::source_location caller = ::std::source_location::current()
#define FASTATTN_AND_CALLER , FASTATTN_CALLER

#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_CALLER
#define FASTATTN_AND_CALLER

#endif

namespace fastattn {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

template <typename T>
using TypeIs = T;  // lets a macro take an array type

// The compute capability that the compiler generates code for, as DeviceLaunch counts it; 0 on the host, which has to
// know every kernel, and in the emulator, which plays every card.
#if defined(__CUDA_ARCH__)
constexpr int kCodeCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCodeCapability = 0;
#endif

// Some kernels are only for cards below a compute capability, because others have no room for them, or their code
// generator would spill registers. Code for the others has never_launched() in place of the body: a card runs code for
// its own compute capability or an older one, never for a newer one.
constexpr int kAnyCapability = 1000;

template <int kCapability>
struct Below {
  static constexpr bool kHasCode = kCodeCapability < kCapability;
};

FASTATTN_DEVICE void never_launched() {
#if !defined(FASTATTN_EMULATED)
  __trap();
#endif
}

}  // namespace fastattn

// FASTATTN_SHARED(name, float[8]) declares a static shared array in a kernel or device function.
// FASTATTN_DYNAMIC_SMEM(name) declares uint8_t* name, the dynamic shared memory, 1024-byte aligned: as the 128-byte
// swizzle needs. A kernel that relies on the alignment has no static shared memory, which would come first.
#if defined(FASTATTN_EMULATED)
#define FASTATTN_DYNAMIC_SMEM(name) uint8_t* const name = ::fastattn::emu::current_view->dynamic_shared
#define FASTATTN_SHARED(name, ...)                                                                    \
  static constexpr char name##_key = 0;                                                               \
  auto& name = *static_cast<::fastattn::TypeIs<__VA_ARGS__>*>(::fastattn::emu::static_shared(         \
      &name##_key, sizeof(::fastattn::TypeIs<__VA_ARGS__>), alignof(::fastattn::TypeIs<__VA_ARGS__>), \
      {"static shared memory", ::std::source_location::current()}))
#else
#define FASTATTN_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) uint8_t name[]
#define FASTATTN_SHARED(name, ...) __shared__::fastattn::TypeIs<__VA_ARGS__> name
#endif
