// A stack and a place to continue. Switching costs about 10 ns on x86-64 (six registers), and is as short on
// AArch64; the fallback for others, swapcontext, makes two system calls a switch and is twenty times slower. Fibers
// never move between OS threads.
#pragma once

#include <cstddef>

namespace fastattn::emu {

struct Fiber {
  void* stack_pointer = nullptr;  // where the saved registers lie; on the fallback, a ucontext_t
  void* stack = nullptr;          // lowest address; null for the OS thread's own stack
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Makes `fiber` start at `entry`, on its own stack, at the next switch to it. `entry` must never return.
void prepare_fiber(Fiber& fiber, void* stack, size_t stack_bytes, void (*entry)());

// Makes `fiber` stand for the OS thread that calls this.
void adopt_os_thread(Fiber& fiber);

// Saves where `from` is and continues `to`. A finished fiber is never switched to again.
void switch_fiber(Fiber& from, Fiber& to, bool from_is_finished);

// To be called first in an entry function; `os_thread` learns the bounds of its stack (AddressSanitizer asks for them).
void enter_fiber(Fiber& os_thread);

// `abandoned` if it was left in the middle of something: ThreadSanitizer would complain about what it had open.
void release_fiber(Fiber& fiber, bool abandoned);

}  // namespace fastattn::emu
