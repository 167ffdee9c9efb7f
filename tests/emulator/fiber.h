// Fibers: stacks that one operating-system thread switches between.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace flashsloth::emulator {

using Entry = void (*)();

#if defined(__x86_64__)

// Saves the registers that a function keeps for its caller, swaps stacks, and restores those of the other side.
extern "C" void flashsloth_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden flashsloth_switch
.globl flashsloth_switch
.type flashsloth_switch, @function
flashsloth_switch:
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
.size flashsloth_switch, . - flashsloth_switch
)");

struct Fiber {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t bytes, Entry entry) {
    auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to, if it did
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Fiber& other) { flashsloth_switch(&stack_pointer, other.stack_pointer); }
};

#else

struct Fiber {
  ucontext_t context;

  void start(char* stack, size_t bytes, Entry entry) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context, &other.context); }
};

#endif

// Stacks are kept for the next launch. Their tops are staggered, so that they do not share the sets of a cache, and
// the last words are a canary: a stack that overflowed is found when its thread ends.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 * 1024, kStride = kBytes + 4096 + 192, kTogether = 256;

  char* take() {
    if (free_.empty()) {
      void* memory = mmap(nullptr, kStride * kTogether, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      for (size_t i = kTogether; i-- > 0;) free_.push_back(static_cast<char*>(memory) + i * kStride);
    }
    char* stack = free_.back();
    free_.pop_back();
    std::memcpy(stack, &kCanary, sizeof kCanary);
    return stack;
  }
  void give_back(char* stack) { free_.push_back(stack); }
  static bool overflowed(const char* stack) { return std::memcmp(stack, &kCanary, sizeof kCanary) != 0; }

 private:
  static constexpr uint64_t kCanary = 0x736C6F746820736Cu;
  std::vector<char*> free_;
};

}  // namespace flashsloth::emulator
