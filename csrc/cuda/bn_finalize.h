// `bn_finalize_kernel`: from BN's statistics to its vectors, running statistics moved, in one launch.
#pragma once

#include <cmath>

#include "cuda/launch.h"
#include "device/scalar.h"

namespace fusedres::cuda {

// T: float | half | bfloat16, of the module's vectors; each may be null.
template <typename T>
struct BnFinalizeProblem {
  const float* stats;  // (3, K): count, mean, M2
  const T* weight;     // (K,)
  const T* bias;       // (K,)
  T* running_mean;     // (K,)
  T* running_var;      // (K,)
  int64_t* counter;    // (), raised by one
  float* bn;           // (4, K): mean, invstd, scale, shift
  int K;
  bool cumulative;       // the running statistics are means over all batches
  float momentum, kept;  // the new batch's weight and the old ones', where they are not
  float eps;
};

constexpr int kFinalizeThreads = 1024;

// One block for all channels, so that the counter is raised once and after everybody has read it.
template <typename T>
__global__ void __launch_bounds__(kFinalizeThreads) bn_finalize_kernel(const BnFinalizeProblem<T> problem) {
  const int K = problem.K;
  float momentum = problem.momentum, kept = problem.kept;
  if (problem.counter) {
    const int64_t batches = *problem.counter + 1;
    if (problem.cumulative) {
      momentum = 1.0f / static_cast<float>(batches);
      kept = 1.0f - momentum;
    }
    __syncthreads();
    if (threadIdx.x == 0) *problem.counter = batches;
  }
  const auto move = [&](T* running, int k, float batch) {
    if (running) running[k] = device::from_float<T>(device::to_float(running[k]) * kept + batch * momentum);
  };
  for (int k = static_cast<int>(threadIdx.x); k < K; k += kFinalizeThreads) {
    const float count = problem.stats[k], mean = problem.stats[K + k], m2 = problem.stats[2 * K + k];
    const float invstd = 1.0f / sqrtf(m2 / count + problem.eps);
    const float scale = problem.weight ? device::to_float(problem.weight[k]) * invstd : invstd;
    const float beta = problem.bias ? device::to_float(problem.bias[k]) : 0.0f;
    problem.bn[k] = mean;
    problem.bn[K + k] = invstd;
    problem.bn[2 * K + k] = scale;
    problem.bn[3 * K + k] = beta - mean * scale;
    move(problem.running_mean, k, mean);
    move(problem.running_var, k, m2 / (count - 1.0f));
  }
}

template <typename T, typename Launch>
void bn_finalize(const BnFinalizeProblem<T>& problem, Launch&& launch) {
  launch(LaunchShape{1, kFinalizeThreads, 0}, bn_finalize_kernel<T>, problem);
}

}  // namespace fusedres::cuda
