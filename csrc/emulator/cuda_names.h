// The words of CUDA C++ that kernels here use, for a compiler that does not know them.
#pragma once

#include <atomic>

#include "emulator/block.h"
#include "emulator/launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (::fusedres::emulator::current->index)
#define blockIdx (::fusedres::emulator::current->block->index)
#define blockDim (::fusedres::emulator::current->block->shape)
#define gridDim (::fusedres::emulator::current->block->grid)

// A variable of a block. Its tag is the address of a static of its own lambda, so every instantiation has its own.
#define FUSEDRES_SHARED(type, name)                                                                         \
  type& name = *static_cast<std::remove_reference_t<type>*>(::fusedres::emulator::current->block->variable( \
      [] {                                                                                                  \
        static const char tag = 0;                                                                          \
        return &tag;                                                                                        \
      }(),                                                                                                  \
      sizeof(type)))

__forceinline__ void __syncthreads() { fusedres::emulator::current->block->block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fusedres::emulator::current->block->meet(mask, "__syncwarp", nullptr,
                                           [mask](void**) { fusedres::emulator::current->block->sync_lanes(mask); });
}

[[gnu::noinline]] inline void __threadfence() {
  using namespace fusedres::emulator;
  if (!current->block->takes("fence", reinterpret_cast<Call>(__builtin_return_address(0)))) return;
  if (Racecheck* race = current->block->race()) race->fence(current->linear);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

namespace fusedres::emulator {

// An atomic operation tells other blocks what this thread has fenced, and this thread what they have.
template <typename Operation>
auto atomically(const void* counter, const Operation& operation) {
  Racecheck* race = current->block->race();
  if (race) race->release(current->linear, counter);
  const auto old = operation();
  if (race) race->observe(current->linear, counter);
  return old;
}

}  // namespace fusedres::emulator

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return fusedres::emulator::atomically(address, [=] { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); });
}
inline int atomicAdd(int* address, int value) {
  return fusedres::emulator::atomically(address, [=] { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return fusedres::emulator::atomically(address, [=] {
    unsigned old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(address, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
    }
    return old;
  });
}
