// The one place that knows who compiles a kernel: nvcc, for a GPU, or a C++ compiler, for csrc/emulator.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// A variable of a block: FUSEDRES_SHARED(float[32], sums);
#define FUSEDRES_SHARED(type, name) __shared__ std::remove_reference_t<type> name
#define FUSEDRES_UNROLL _Pragma("unroll")
#else
#include "emulator/cuda_names.h"
#define FUSEDRES_UNROLL
#endif
#define FUSEDRES_DEVICE __device__ __forceinline__
#define FUSEDRES_HOST_DEVICE __host__ __device__ __forceinline__

namespace fusedres::device {

constexpr int kWarp = 32;

FUSEDRES_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
FUSEDRES_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

template <typename Int>
FUSEDRES_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename Int>
FUSEDRES_HOST_DEVICE constexpr Int round_up(Int value, Int multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace fusedres::device
