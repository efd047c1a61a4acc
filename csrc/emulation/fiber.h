// One fiber = one CUDA thread: a stack of its own and a switch that saves the callee-saved registers, nothing else.
// The switch costs some 20 ns, so a block of 1,024 "threads" that meets at a barrier a few times costs microseconds;
// operating-system threads would be a hundred times slower, and their order could not be chosen.
#pragma once
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMULATION_POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define EMULATION_UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define EMULATION_POISON(address, bytes) ((void)0)
#define EMULATION_UNPOISON(address, bytes) ((void)0)
#endif

namespace emulation {

// 64 KB of stack above one guard page: an overflow faults instead of running into the neighbour.
class FiberStack {
 public:
  static constexpr size_t bytes = 64 * 1024, guard_bytes = 4096;

  FiberStack() {
    void* memory = mmap(nullptr, bytes + guard_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for a fiber's stack");
    base_ = static_cast<char*>(memory);
    mprotect(base_, guard_bytes, PROT_NONE);
  }
  FiberStack(FiberStack&& other) noexcept : base_(other.base_) { other.base_ = nullptr; }
  FiberStack(const FiberStack&) = delete;
  FiberStack& operator=(const FiberStack&) = delete;
  ~FiberStack() {
    if (base_ != nullptr) munmap(base_, bytes + guard_bytes);
  }

  char* low() const { return base_ + guard_bytes; }
  // Fibers that were abandoned in the middle of a kernel leave their frames' red zones behind.
  void forget_frames() const { EMULATION_UNPOISON(low(), bytes); }

 private:
  char* base_;
};

#if defined(__x86_64__)
// The System V callee-saved registers live on the stack that is left; the stack pointer is all that must be kept.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void k2_emulation_switch(void** save, void* load);
__asm__(
    ".pushsection .text\n"
    ".weak k2_emulation_switch\n"
    ".type k2_emulation_switch,@function\n"
    "k2_emulation_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size k2_emulation_switch,.-k2_emulation_switch\n"
    ".popsection\n");

inline void switch_context(Context& from, const Context& to) {
  k2_emulation_switch(&from.stack_pointer, to.stack_pointer);
}

// `colour` shifts the start by cache lines: stacks 64 KB apart would otherwise share the same few cache sets.
inline void prepare_context(Context& context, const FiberStack& stack, unsigned colour, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack.low() + FiberStack::bytes - (colour % 61) * 64);
  void** words = reinterpret_cast<void**>(top & ~uintptr_t{63});
  *--words = nullptr;  // the entry sees a 16-byte aligned frame and no caller
  *--words = reinterpret_cast<void*>(entry);
  words -= 6;
  context.stack_pointer = words;
}
#else
// Any other processor: the C library's contexts, ten times slower because each switch is a system call.
struct Context {
  ucontext_t value;
};

inline void switch_context(Context& from, const Context& to) { swapcontext(&from.value, &to.value); }

inline void prepare_context(Context& context, const FiberStack& stack, unsigned, void (*entry)()) {
  getcontext(&context.value);
  context.value.uc_stack.ss_sp = stack.low();
  context.value.uc_stack.ss_size = FiberStack::bytes;
  context.value.uc_link = nullptr;
  makecontext(&context.value, entry, 0);
}
#endif

}  // namespace emulation
