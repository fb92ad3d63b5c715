// `dbn_kernel`: BN backward, dz = a*g + b*(z - mean) + c, in one pass.
#pragma once

#include "cuda/tail_tile.h"

namespace fusedres::cuda {

// z and sums both, or neither: then the statistics were constants and dz = scale*g.
template <typename T>
struct DbnProblem {
  const T* g;         // (rows, C)
  const T* z;         // (rows, C), or null
  const float* bn;    // (4, C): mean, invstd, scale, shift
  const float* sums;  // (2, C): dbeta, dgamma, or null
  T* dz;              // (rows, C)
  int64_t rows;
  int C;
  float inv_count;
  TailPlan plan{};
};

constexpr int kDbnAhead = 4;  // rows that a thread loads at once

template <typename T, int kSize>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks) dbn_kernel(const DbnProblem<T> problem) {
  const auto thread = TailThread<kSize>::of(problem.plan, problem.rows, problem.C);
  Packed<T, kSize> g[kDbnAhead], z[kDbnAhead];
  FUSEDRES_UNROLL
  for (int i = 0; i < kDbnAhead; ++i) {
    const int64_t row = thread.row + i * thread.down;
    g[i] = thread.load(problem.g, row);
    if (problem.z) z[i] = thread.load(problem.z, row);
  }
  float a[kSize], b[kSize], c[kSize], mean[kSize];
  thread.load_channels(problem.bn, 2, a);
  if (problem.z) {
    float invstd[kSize], dbeta[kSize], dgamma[kSize];
    thread.load_channels(problem.bn, 0, mean);
    thread.load_channels(problem.bn, 1, invstd);
    thread.load_channels(problem.sums, 0, dbeta);
    thread.load_channels(problem.sums, 1, dgamma);
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) {
      b[j] = -a[j] * invstd[j] * dgamma[j] * problem.inv_count;
      c[j] = -a[j] * dbeta[j] * problem.inv_count;
    }
  }
  FUSEDRES_UNROLL
  for (int i = 0; i < kDbnAhead; ++i) {
    float dz[kSize], deviation[kSize];
    g[i].unpack(dz);
    if (problem.z) z[i].unpack(deviation);
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) {
      dz[j] = a[j] * dz[j];
      if (problem.z) dz[j] += b[j] * (deviation[j] - mean[j]) + c[j];
    }
    thread.store(problem.dz, thread.row + i * thread.down, dz);
  }
}

// False, and no launch, where a grid cannot have as many blocks.
template <typename T, typename Launch>
bool dbn(const DbnProblem<T>& problem, Launch&& launch) {
  return launch_pass<T>(problem, kDbnAhead, [](auto width) { return dbn_kernel<T, width.value>; }, launch);
}

}  // namespace fusedres::cuda
