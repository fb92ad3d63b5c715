// Shuffles, votes, named barriers, and the reductions over warps and blocks made of them.
#pragma once

#include "device/memory.h"
#ifndef __CUDACC__
#include "emulator/warp.h"
#endif

namespace fusedres::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

template <typename T>
FUSEDRES_DEVICE T shuffle_xor(T value, int lanes, uint32_t mask = kAllLanes) {
#ifdef __CUDACC__
  return __shfl_xor_sync(mask, value, lanes);
#else
  return emulator::shuffle(mask, value, "shfl.xor", [lanes](int lane) { return lane ^ lanes; });
#endif
}

template <typename T>
FUSEDRES_DEVICE T shuffle_down(T value, int lanes, uint32_t mask = kAllLanes) {
#ifdef __CUDACC__
  return __shfl_down_sync(mask, value, lanes);
#else
  return emulator::shuffle(mask, value, "shfl.down", [lanes](int lane) { return lane + lanes; });
#endif
}

template <typename T>
FUSEDRES_DEVICE T shuffle_from(T value, int source, uint32_t mask = kAllLanes) {
#ifdef __CUDACC__
  return __shfl_sync(mask, value, source);
#else
  return emulator::shuffle(mask, value, "shfl.idx", [source](int) { return source % emulator::kWarpSize; });
#endif
}

FUSEDRES_DEVICE uint32_t vote_ballot(bool predicate, uint32_t mask = kAllLanes) {
#ifdef __CUDACC__
  return __ballot_sync(mask, predicate);
#else
  return emulator::ballot(mask, predicate);
#endif
}

FUSEDRES_DEVICE bool vote_any(bool predicate, uint32_t mask = kAllLanes) { return vote_ballot(predicate, mask) != 0; }
FUSEDRES_DEVICE bool vote_all(bool predicate, uint32_t mask = kAllLanes) {
  return vote_ballot(predicate, mask) == mask;
}

// Named barriers 1 to 15, for part of a block; `threads`, a multiple of 32, come to it in all.
FUSEDRES_DEVICE void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::current->block->barrier(id, threads, true, "bar.sync");
#endif
}

// Comes to the barrier without waiting there.
FUSEDRES_DEVICE void barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::current->block->barrier(id, threads, false, "bar.arrive");
#endif
}

// The same in every lane, and the same for every machine: the tree is fixed. `combine(a, b)` must commute.
template <typename T, typename Combine>
FUSEDRES_DEVICE T warp_reduce(T value, const Combine& combine) {
  FUSEDRES_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(value, lanes));
  return value;
}

template <typename T>
FUSEDRES_DEVICE T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

// The sum over a block of kThreads threads, in every thread. `scratch` (kThreads / 32) is free again after it.
template <int kThreads, typename T>
FUSEDRES_DEVICE T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) store_scalar(scratch + warp_index(), value);
  __syncthreads();
  T total = load_scalar(scratch);
  FUSEDRES_UNROLL
  for (int i = 1; i < kThreads / kWarp; ++i) total = total + load_scalar(scratch + i);
  __syncthreads();
  return total;
}

}  // namespace fusedres::device
