// What the blocks of a grid tell one another, through counters in global memory that are zero before the launch.
#pragma once

#include "device/memory.h"
#ifndef __CUDACC__
#include "emulator/grid.h"
#endif

namespace fusedres::device {

// This block's number in the order in which blocks begin, in every thread. All blocks with lower numbers are running or
// done, which of lower blockIdx nobody promises: they may be waited for.
FUSEDRES_DEVICE unsigned take_ticket(unsigned* counter) {
  FUSEDRES_SHARED(unsigned, ticket);
  if (threadIdx.x == 0) store_scalar(&ticket, atomicAdd(counter, 1u));
  __syncthreads();
  return load_scalar(&ticket);
}

// Writes to global memory what other blocks read once this block has arrived.
template <typename T>
FUSEDRES_DEVICE void publish(T* to, T value) {
#ifdef __CUDACC__
  *to = value;
#else
  emulator::publish(to, value);
#endif
}

// Raises `counter` by one: whoever sees it sees what this block's threads wrote before.
FUSEDRES_DEVICE void arrive(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
}

// Until `counter` has reached `count`.
FUSEDRES_DEVICE void wait_for(const unsigned* counter, unsigned count) {
  if (threadIdx.x == 0) {
#ifdef __CUDACC__
    while (*static_cast<const volatile unsigned*>(counter) < count) __nanosleep(32);
#else
    emulator::spin_until(counter, count);
#endif
    __threadfence();
  }
  __syncthreads();
}

}  // namespace fusedres::device
