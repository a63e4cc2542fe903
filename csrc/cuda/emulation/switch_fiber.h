// Changes from one stack to another, without the system calls of swapcontext.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace quest {
namespace cuda {

struct Stack {
  char* memory = nullptr;
  size_t size = 0;
  void* top = nullptr;  // of the suspended stack
  void* fake_stack = nullptr;
};

#if !defined(__x86_64__)
#error "the emulation of CUDA threads knows x86-64 only"
#endif

extern "C" void quest_switch_stack(void** save, void* load);
asm(R"(
.text
.type quest_switch_stack, @function
quest_switch_stack:
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
)");

// `entry` runs at the first switch to the stack and does not return. What ran there before may have
// been left before its end.
inline void prepare(Stack& stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.memory, stack.size);
  stack.fake_stack = nullptr;
#endif
  void** top = reinterpret_cast<void**>(stack.memory + stack.size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack.top = top;
}

// On the stack `to`, after a switch from `from`: where that is, if it was not made here.
inline void finish_switch(Stack& to, Stack& from) {
  (void)to;
  (void)from;
#if defined(__SANITIZE_ADDRESS__)
  const void* memory = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(to.fake_stack, &memory, &size);
  if (!from.memory) {
    from.memory = static_cast<char*>(const_cast<void*>(memory));
    from.size = size;
  }
#endif
}

inline void switch_stack(Stack& from, Stack& to, bool from_is_done) {
  (void)from_is_done;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_stack, to.memory, to.size);
#endif
  quest_switch_stack(&from.top, to.top);
  finish_switch(from, to);
}

}  // namespace cuda
}  // namespace quest
