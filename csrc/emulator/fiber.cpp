#include "emulator/fiber.h"

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#include "emulator/sanitizers.h"

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))
#define FASTATTN_EMULATOR_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fastattn::emu {

#if defined(FASTATTN_EMULATOR_OWN_SWITCH)

// Puts the registers that a callee must preserve on the stack, stores the stack pointer, and undoes it all on the other
// stack. The floating-point control words are the same in every fiber and stay as they are.
extern "C" void fastattn_emulator_switch(void** save_stack_pointer, void* new_stack_pointer);

#if defined(__x86_64__)

asm(R"(
.text
.globl fastattn_emulator_switch
.hidden fastattn_emulator_switch
.type fastattn_emulator_switch,@function
fastattn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_emulator_switch, .-fastattn_emulator_switch
)");

static void* initial_stack_pointer(void* stack, size_t stack_bytes, void (*entry)(), void*) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{63};
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // the return address of entry: it has none, and this keeps the stack aligned as after a call
  *--slot = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--slot = nullptr;
  return slot;
}

#else  // AArch64

asm(R"(
.text
.hidden fastattn_emulator_start
.type fastattn_emulator_start,%function
fastattn_emulator_start:
  mov x16, x19
  mov x30, xzr
  br x16
.size fastattn_emulator_start, .-fastattn_emulator_start

.globl fastattn_emulator_switch
.hidden fastattn_emulator_switch
.type fastattn_emulator_switch,%function
fastattn_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastattn_emulator_switch, .-fastattn_emulator_switch
)");

// Goes to x19 as a function without a caller.
extern "C" void fastattn_emulator_start();

static void* initial_stack_pointer(void* stack, size_t stack_bytes, void (*entry)(), void*) {
  constexpr int kX19 = 0, kX30 = 11, kSavedRegisters = 20;
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{63};
  void** slots = reinterpret_cast<void**>(top) - kSavedRegisters;
  for (int slot = 0; slot < kSavedRegisters; ++slot) slots[slot] = nullptr;
  slots[kX19] = reinterpret_cast<void*>(entry);
  slots[kX30] = reinterpret_cast<void*>(fastattn_emulator_start);
  return slots;
}

#endif

static void switch_stacks(Fiber& from, Fiber& to) { fastattn_emulator_switch(&from.stack_pointer, to.stack_pointer); }
static void* os_thread_context(void*) { return nullptr; }
static void free_context(void*) {}

#else

static ucontext_t* context_of(void* old) {
  return static_cast<ucontext_t*>(old != nullptr ? old : std::calloc(1, sizeof(ucontext_t)));
}

static void* initial_stack_pointer(void* stack, size_t stack_bytes, void (*entry)(), void* old) {
  ucontext_t* context = context_of(old);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

static void switch_stacks(Fiber& from, Fiber& to) {
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
}
static void* os_thread_context(void* old) { return context_of(old); }
static void free_context(void* context) { std::free(context); }

#endif

void prepare_fiber(Fiber& fiber, void* stack, size_t stack_bytes, void (*entry)()) {
  asan_unpoison(stack, stack_bytes);
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.stack_pointer = initial_stack_pointer(stack, stack_bytes, entry, fiber.stack_pointer);
  fiber.asan_fake_stack = nullptr;
#if defined(FASTATTN_EMULATOR_TSAN)
  if (fiber.tsan_fiber != nullptr) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void adopt_os_thread(Fiber& fiber) {
  fiber.stack_pointer = os_thread_context(fiber.stack_pointer);
#if defined(FASTATTN_EMULATOR_TSAN)
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_is_finished) {
#if defined(FASTATTN_EMULATOR_TSAN)
  constexpr unsigned kNoSynchronisation = 1;
  __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_is_finished ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
  switch_stacks(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber([[maybe_unused]] Fiber& os_thread) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (os_thread.stack == nullptr) {  // the first fiber of a block is entered from the OS thread, the others from fibers
    os_thread.stack = const_cast<void*>(bottom);
    os_thread.stack_bytes = bytes;
  }
#endif
}

void release_fiber(Fiber& fiber, [[maybe_unused]] bool abandoned) {
  free_context(fiber.stack_pointer);
  fiber.stack_pointer = nullptr;
#if defined(FASTATTN_EMULATOR_TSAN)
  if (fiber.stack != nullptr && !abandoned) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
#endif
}

}  // namespace fastattn::emu
