#include "common/isa.h"

#include <atomic>

namespace fastattn {
namespace {

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512Bf16:
      return cpu_supports(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

std::atomic<int>& active() {
  static std::atomic<int> isa{[] {
    for (Isa candidate : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
      if (isa_is_usable(candidate)) return static_cast<int>(candidate);
    }
    return static_cast<int>(Isa::kPortable);
  }()};
  return isa;
}

}  // namespace

bool isa_is_built(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return FASTATTN_BUILD_AVX2;
    case Isa::kAvx512:
      return FASTATTN_BUILD_AVX512;
    case Isa::kAvx512Bf16:
      return FASTATTN_BUILD_AVX512_BF16;
  }
  return false;
}

bool isa_is_usable(Isa isa) { return isa_is_built(isa) && cpu_supports(isa); }

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

void set_active_isa(Isa isa) { active().store(static_cast<int>(isa), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace fastattn
