// Stores that bypass the caches, for what is written whole and not read again soon.
#pragma once

#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Stores past the caches: a line that is written whole need not be read first. p is aligned to the vector.
FASTATTN_INLINE void stream(Vec<float> value, float* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, value.v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, value.v);
#else
  value.store(p);
#endif
}
// To be called by a thread that streamed, before another thread may read what it wrote.
FASTATTN_INLINE void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
