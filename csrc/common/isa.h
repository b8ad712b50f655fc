// Which build of the CPU kernels runs. Every *_cpu.cpp is compiled once per instruction set into a namespace of its own
// (isa_portable, isa_avx2, isa_avx512); FASTATTN_CPU_DISPATCH calls the best one that this machine can run. Kernels
// that multiply bfloat16 have a fourth build, isa_avx512_bf16; where they do not, that build is made of avx512's
// kernels.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool isa_is_built(Isa isa);
// True if this machine can run the build: it was compiled, and the processor and the operating system support it.
bool isa_is_usable(Isa isa);
Isa active_isa();
// For tests and benchmarks: the whole process switches. The caller checks isa_is_usable first.
void set_active_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace fastattn

#ifndef FASTATTN_BUILD_AVX2
#define FASTATTN_BUILD_AVX2 0
#endif
#ifndef FASTATTN_BUILD_AVX512
#define FASTATTN_BUILD_AVX512 0
#endif
#ifndef FASTATTN_BUILD_AVX512_BF16
#define FASTATTN_BUILD_AVX512_BF16 0
#endif

// Declares `result function arguments;` in the namespace of every build, e.g.
//   FASTATTN_DECLARE_CPU_KERNEL(void, layer_norm_fwd_cpu, (const LayerNormParams& p));
#define FASTATTN_DECLARE_CPU_KERNEL(result, function, arguments) \
  namespace isa_portable {                                       \
  result function arguments;                                     \
  }                                                              \
  namespace isa_avx2 {                                           \
  result function arguments;                                     \
  }                                                              \
  namespace isa_avx512 {                                         \
  result function arguments;                                     \
  }
// The same for a kernel that setup.py lists in BF16_SOURCES; called by FASTATTN_BF16_CPU_DISPATCH.
#define FASTATTN_DECLARE_BF16_CPU_KERNEL(result, function, arguments) \
  FASTATTN_DECLARE_CPU_KERNEL(result, function, arguments)            \
  namespace isa_avx512_bf16 {                                         \
  result function arguments;                                          \
  }

#if FASTATTN_BUILD_AVX512 && FASTATTN_BUILD_AVX2
#define FASTATTN_CPU_DISPATCH(function, ...)                                                            \
  (::fastattn::active_isa() >= ::fastattn::Isa::kAvx512 ? ::fastattn::isa_avx512::function(__VA_ARGS__) \
   : ::fastattn::active_isa() == ::fastattn::Isa::kAvx2 ? ::fastattn::isa_avx2::function(__VA_ARGS__)   \
                                                        : ::fastattn::isa_portable::function(__VA_ARGS__))
#else
#define FASTATTN_CPU_DISPATCH(function, ...) (::fastattn::isa_portable::function(__VA_ARGS__))
#endif

#if FASTATTN_BUILD_AVX512_BF16
#define FASTATTN_BF16_CPU_DISPATCH(function, ...)                                                                \
  (::fastattn::active_isa() == ::fastattn::Isa::kAvx512Bf16 ? ::fastattn::isa_avx512_bf16::function(__VA_ARGS__) \
                                                            : FASTATTN_CPU_DISPATCH(function, __VA_ARGS__))
#else
#define FASTATTN_BF16_CPU_DISPATCH(function, ...) FASTATTN_CPU_DISPATCH(function, __VA_ARGS__)
#endif
