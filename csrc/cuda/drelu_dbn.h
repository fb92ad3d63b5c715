// `drelu_dbn_kernel`: the backward tail of a block in one pass: the ReLU's mask on the gradient, and the sums that the
// backward of BN wants of it, of one branch or both. `drelu_dbn_merge_kernel` adds up what blocks have summed.
#pragma once

#include "cuda/tail_tile.h"

namespace fusedres::cuda {

// z and bn both, or neither; the other branch's likewise. A map without rows may be null, its bn is not.
template <typename T>
struct DreluDbnProblem {
  const T* dy;               // (rows, C)
  const T* y;                // (rows, C), the ReLU's output, or null: there was none
  const T* z;                // (rows, C), or null
  const float* bn;           // (4, C): mean, invstd, scale, shift, or null
  const T* residual_z;       // (rows, C), or null
  const float* residual_bn;  // (4, C), or null
  T* g;                      // (rows, C): dy where y is not <= 0
  float* partials;           // (drelu_dbn_parts(rows, C), 3, C): sum(g), sum(g*(z - mean)), that of the other branch
  float* sums;               // (2, C): sum(g), invstd*sum(g*(z - mean)); without z only the first
  float* residual_sums;      // (2, C), or null
  int64_t rows;
  int C;
  TailPlan plan{};
};

constexpr int kBackwardAhead = 2;  // rows that a thread loads at once
constexpr int kBackwardSums = 3;

// Of a thread with kSize channels, in whole vectors.
template <int kSize>
constexpr int kBackwardFloats = device::round_up(kBackwardSums * kSize, 4);

// sums += g*(z - mean).
template <typename T, int kSize>
FUSEDRES_DEVICE void add_products(const float (&g)[kSize], const Packed<T, kSize>& z, const float (&mean)[kSize],
                                  float* sums) {
  float value[kSize];
  z.unpack(value);
  FUSEDRES_UNROLL
  for (int j = 0; j < kSize; ++j) sums[j] += g[j] * (value[j] - mean[j]);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks) drelu_dbn_kernel(const DreluDbnProblem<T> problem) {
  constexpr int kSums = kBackwardFloats<kSize>;
  const auto thread = TailThread<kSize>::of(problem.plan, problem.rows, problem.C);
  device::SharedArena arena;
  float* scratch = arena.take<float>(merge_floats(kSums));
  float sums[kSums] = {}, mean[kSize], residual_mean[kSize];
  if (problem.bn) thread.load_channels(problem.bn, 0, mean);
  if (problem.residual_bn) thread.load_channels(problem.residual_bn, 0, residual_mean);
  for (int64_t row0 = thread.row; row0 < thread.end; row0 += kBackwardAhead * thread.down) {
    Packed<T, kSize> dy[kBackwardAhead], y[kBackwardAhead], z[kBackwardAhead], residual_z[kBackwardAhead];
    FUSEDRES_UNROLL
    for (int i = 0; i < kBackwardAhead; ++i) {
      const int64_t row = row0 + i * thread.down;
      dy[i] = thread.load(problem.dy, row);
      if (problem.y) y[i] = thread.load(problem.y, row);
      if (problem.bn) z[i] = thread.load(problem.z, row);
      if (problem.residual_bn) residual_z[i] = thread.load(problem.residual_z, row);
    }
    FUSEDRES_UNROLL
    for (int i = 0; i < kBackwardAhead; ++i) {
      float g[kSize], value[kSize];
      dy[i].unpack(g);
      if (problem.y) y[i].unpack(value);
      FUSEDRES_UNROLL
      for (int j = 0; j < kSize; ++j) {
        if (problem.y && value[j] <= 0.0f) g[j] = 0.0f;
        sums[j] += g[j];  // beyond the rows g is 0, and nothing is added
      }
      if (problem.bn) add_products(g, z[i], mean, sums + kSize);
      if (problem.residual_bn) add_products(g, residual_z[i], residual_mean, sums + 2 * kSize);
      thread.store(problem.g, row0 + i * thread.down, g);
    }
  }
  merge_down(problem.plan, sums, scratch, [](auto& mine, const auto& other) {
    FUSEDRES_UNROLL
    for (int i = 0; i < kSums; ++i) mine[i] += other[i];
  });
  if (static_cast<int>(threadIdx.x) >= problem.plan.across()) return;
  FUSEDRES_UNROLL
  for (int k = 0; k < kBackwardSums; ++k) {
    float sum[kSize];
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) sum[j] = sums[k * kSize + j];
    thread.store_channels(problem.partials, thread.part * kBackwardSums + k, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks) drelu_dbn_merge_kernel(const DreluDbnProblem<T> problem) {
  const MergeThread thread = MergeThread::of(problem.C);
  if (thread.valid <= 0) return;
  float sums[kBackwardSums][kMergeChannels] = {};
  thread.for_each_part<kBackwardSums>(problem.partials, static_cast<int>(problem.plan.parts), [&](auto& part) {
    FUSEDRES_UNROLL
    for (int k = 0; k < kBackwardSums; ++k) {
      FUSEDRES_UNROLL
      for (int j = 0; j < kMergeChannels; ++j) sums[k][j] += part[k][j];
    }
  });
  FUSEDRES_UNROLL
  for (int k = 0; k < kBackwardSums; ++k) {
    FUSEDRES_UNROLL
    for (int j = 0; j < kMergeChannels; ++j) sums[k][j] = device::warp_sum(sums[k][j]);
  }
  if (device::lane_index() != 0) return;
  const auto store_dgamma = [&](float* to, const float* bn, float (&sum)[kMergeChannels]) {
    float invstd[kMergeChannels];
    thread.load_channels(bn, 1, invstd);
    FUSEDRES_UNROLL
    for (int j = 0; j < kMergeChannels; ++j) sum[j] *= invstd[j];
    thread.store_channels(to, 1, sum);
  };
  thread.store_channels(problem.sums, 0, sums[0]);
  if (problem.bn) store_dgamma(problem.sums, problem.bn, sums[1]);
  if (problem.residual_bn) {
    thread.store_channels(problem.residual_sums, 0, sums[0]);
    store_dgamma(problem.residual_sums, problem.residual_bn, sums[2]);
  }
}

// How many parts a launch leaves partials of.
template <typename T>
int64_t drelu_dbn_parts(int64_t rows, int C) {
  return sum_parts<T>(rows, C, kBackwardAhead);
}

// Without rows the sums are zeros; without channels nothing is launched.
template <typename T, typename Launch>
void drelu_dbn(const DreluDbnProblem<T>& problem, Launch&& launch) {
  launch_sum<T>(
      problem, kBackwardAhead, [](auto width) { return kBackwardFloats<width.value>; },
      [](auto width) { return drelu_dbn_kernel<T, width.value>; }, drelu_dbn_merge_kernel<T>, launch);
}

}  // namespace fusedres::cuda
