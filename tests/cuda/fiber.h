// A fiber for each CUDA thread: a stack of its own, and a switch that saves what the ABI asks for.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)
struct Fiber {
  void* stack_pointer = nullptr;
};
extern "C" void mmkern_switch_fiber(void** save, void* load);
asm(R"(
.text
.weak mmkern_switch_fiber
.type mmkern_switch_fiber, @function
mmkern_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
inline void switch_fiber(Fiber& from, Fiber& to) {
  mmkern_switch_fiber(&from.stack_pointer, to.stack_pointer);
}
inline void start_fiber(Fiber& fiber, char* stack, size_t size, void (*entry)()) {
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t(63));
  *--top = nullptr;  // where `entry` would return to: it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
// Two to three times slower: swapcontext asks the kernel for the signal mask.
struct Fiber {
  ucontext_t context;
};
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void start_fiber(Fiber& fiber, char* stack, size_t size, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#endif

}  // namespace emulator
