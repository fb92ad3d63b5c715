// cp.async: 16 bytes from global to shared memory behind the computation's back, and the pipeline made of it.
#pragma once

#include "device/platform.h"
#ifndef __CUDACC__
#include "emulator/async_copy.h"
#endif

namespace fusedres::device {

// Copies 16 bytes, or writes 16 bytes of zeros where not `valid` (then `source` is not read).
FUSEDRES_DEVICE void copy_async(void* destination, const void* source, bool valid) {
#ifdef __CUDACC__
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(destination));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(source), "r"(bytes) : "memory");
#else
  emulator::cp_async(destination, source, 16, valid ? 16 : 0);
#endif
}

// Closes a group: all copies that this thread issued since the last one.
FUSEDRES_DEVICE void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Until at most kPending of this thread's groups are on their way. Others see the data after a barrier only.
template <int kPending>
FUSEDRES_DEVICE void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#else
  emulator::cp_async_wait(kPending);
#endif
}

// For each step in [0, steps): `load(step, slot)` issues its copies kStages - 1 steps ahead, `compute(step, slot)` uses
// them. Slots are reused every kStages steps; one barrier a step both shows the new slot and frees the oldest.
// No barrier comes after the last compute: one is needed before its slot is written again.
template <int kStages, typename Load, typename Compute>
FUSEDRES_DEVICE void pipeline(int steps, const Load& load, const Compute& compute) {
  static_assert(kStages >= 2);
  // Fill the pipeline.
  FUSEDRES_UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    commit_copies();
  }
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    const int ahead = step + kStages - 1;
    if (ahead < steps) load(ahead, slot == 0 ? kStages - 1 : slot - 1);
    commit_copies();  // an empty group keeps the count
    compute(step, slot);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

}  // namespace fusedres::device
