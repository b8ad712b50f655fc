// What the runtime tells AddressSanitizer and ThreadSanitizer; every call is empty in an ordinary build.
//
// ThreadSanitizer sees each emulated thread as one of its own fibers. Only operations that order memory on the device
// call release and acquire: barriers, mbarriers and __syncwarp, not shuffles or mma. So a report means that the kernel
// lacks a barrier, whatever schedule this run happened to take. Only kernel files are instrumented: what the runtime
// itself reads and writes for an instruction is told by tsan_read and tsan_write, the rest is hidden by IgnoreScope.
#pragma once

#include <cstddef>

#if defined(FASTATTN_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* begin, unsigned long bytes);
void __tsan_write_range(void* begin, unsigned long bytes);
}
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastattn::emu {

#if defined(FASTATTN_EMULATOR_TSAN)
inline void tsan_release(void* object) { __tsan_release(object); }
inline void tsan_acquire(void* object) { __tsan_acquire(object); }
// What an instruction of the running thread reads and writes; seen also from within an IgnoreScope.
void tsan_read(const void* begin, size_t bytes);
void tsan_write(void* begin, size_t bytes);

// Hides the runtime's own memory traffic. Nests; a fiber that is abandoned inside one calls close_ignore_scopes.
void close_ignore_scopes();
class IgnoreScope {
 public:
  IgnoreScope();
  ~IgnoreScope();
  IgnoreScope(const IgnoreScope&) = delete;
  IgnoreScope& operator=(const IgnoreScope&) = delete;
};
#else
inline void close_ignore_scopes() {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(void*, size_t) {}

class IgnoreScope {
 public:
  IgnoreScope() {}
  ~IgnoreScope() {}
};
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void asan_poison(void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void asan_unpoison(void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
inline void asan_poison(void*, size_t) {}
inline void asan_unpoison(void*, size_t) {}
#endif

}  // namespace fastattn::emu
