// One CUDA thread of the emulator: a stack of its own, entered and left by switching stacks.
//
// On x86-64 a switch saves the callee-saved registers and nothing else, some 20 times faster than swapcontext, which
// asks the kernel for the signal mask each time. Elsewhere, or with FUSEDRES_UCONTEXT, it is swapcontext.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) && !defined(FUSEDRES_UCONTEXT)
#define FUSEDRES_UCONTEXT
#endif
#ifdef FUSEDRES_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedres::emulator {

// A stack, and below it a page that nobody may touch: an overflow stops there.
class Stack {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  static constexpr size_t kGuard = 4096;

  Stack() {
    base_ = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, kGuard, PROT_NONE);
  }
  Stack(Stack&& other) noexcept : base_(other.base_) { other.base_ = nullptr; }
  Stack(const Stack&) = delete;
  ~Stack() {
    if (!base_) return;
    forget_frames();
    munmap(base_, kGuard + kBytes);
  }
  char* bottom() const { return static_cast<char*>(base_) + kGuard; }
  char* top() const { return bottom() + kBytes; }

  // Frames that were left and never returned from keep their redzones poisoned, also for the next user of the address.
  void forget_frames() const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom(), kBytes);
#endif
  }

 private:
  void* base_;
};

#ifndef FUSEDRES_UCONTEXT
// Pushes the callee-saved registers, stores the stack pointer in *save, takes over `load` and pops what it finds there.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// Runs `entry(argument)` on a stack of its own. `entry` never returns: it leaves by `exit`.
class Fiber {
 public:
  using Entry = void (*)(void*);

  void start(const Stack& stack, Entry entry, void* argument) {
    stack_ = &stack;
    entry_ = entry;
    argument_ = argument;
    stack.forget_frames();
#ifdef FUSEDRES_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = Stack::kBytes;
    context_.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::begin), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
#else
    void** frame = reinterpret_cast<void**>(stack.top()) - 8;  // six registers, the address to return to, alignment
    for (int i = 0; i < 6; ++i) frame[i] = nullptr;
    frame[4] = this;  // rbx, which the trampoline hands to begin()
    frame[6] = reinterpret_cast<void*>(&trampoline);
    pointer_ = frame;
#endif
  }

  // From the scheduler into the fiber, until the fiber yields or exits.
  void resume() {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_->bottom(), Stack::kBytes);
#endif
    swap_in();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // From the fiber back to the scheduler.
  void yield() {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_bottom_, scheduler_size_);
#endif
    swap_out();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  [[noreturn]] void exit() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, scheduler_bottom_, scheduler_size_);
#endif
    swap_out();
    __builtin_unreachable();
  }

 private:
#ifdef FUSEDRES_UCONTEXT
  static void begin(unsigned high, unsigned low) {
    run(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low));
  }
  void swap_in() { swapcontext(&scheduler_, &context_); }
  void swap_out() { swapcontext(&context_, &scheduler_); }
#else
  __attribute__((naked)) static void trampoline() {
    asm volatile("movq %%rbx, %%rdi\n jmp *%0\n" : : "r"(&run) : "rdi");
  }
  void swap_in() { switch_stacks(&scheduler_, pointer_); }
  void swap_out() { switch_stacks(&pointer_, scheduler_); }
#endif

  static void run(Fiber* fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &fiber->scheduler_bottom_, &fiber->scheduler_size_);
#endif
    fiber->entry_(fiber->argument_);
    __builtin_trap();
  }

  const Stack* stack_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
#endif
#ifdef FUSEDRES_UCONTEXT
  ucontext_t context_, scheduler_;
#else
  void *pointer_ = nullptr, *scheduler_ = nullptr;
#endif
};

}  // namespace fusedres::emulator
