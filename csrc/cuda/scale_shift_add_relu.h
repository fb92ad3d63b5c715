// `scale_shift_add_relu_kernel`: the forward tail of a block, y = act(scale*z + shift + r), in one pass.
//
// r is nothing, the residual, or scale*residual + shift of the residual's own BN.
#pragma once

#include "cuda/tail_tile.h"
#include "device/epilogue.h"

namespace fusedres::cuda {

template <typename T>
struct ScaleShiftAddReluProblem {
  const T* z;                // (rows, C)
  const float* bn;           // (4, C): mean, invstd, scale, shift
  const T* residual;         // (rows, C), or null
  const float* residual_bn;  // (4, C), or null
  T* y;                      // (rows, C)
  int64_t rows;
  int C;
  bool relu;
  TailPlan plan{};
};

constexpr int kForwardAhead = 4;  // rows that a thread loads at once

template <typename T, int kSize>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks)
    scale_shift_add_relu_kernel(const ScaleShiftAddReluProblem<T> problem) {
  const auto thread = TailThread<kSize>::of(problem.plan, problem.rows, problem.C);
  Packed<T, kSize> z[kForwardAhead], residual[kForwardAhead];
  FUSEDRES_UNROLL
  for (int i = 0; i < kForwardAhead; ++i) {
    const int64_t row = thread.row + i * thread.down;
    z[i] = thread.load(problem.z, row);
    if (problem.residual) residual[i] = thread.load(problem.residual, row);
  }
  float scale[kSize], shift[kSize], residual_scale[kSize], residual_shift[kSize];
  thread.load_channels(problem.bn, 2, scale);
  thread.load_channels(problem.bn, 3, shift);
  if (problem.residual_bn) {
    thread.load_channels(problem.residual_bn, 2, residual_scale);
    thread.load_channels(problem.residual_bn, 3, residual_shift);
  }
  FUSEDRES_UNROLL
  for (int i = 0; i < kForwardAhead; ++i) {
    float y[kSize], added[kSize];
    z[i].unpack(y);
    if (problem.residual) residual[i].unpack(added);
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) {
      y[j] = scale[j] * y[j] + shift[j];
      if (problem.residual_bn) added[j] = residual_scale[j] * added[j] + residual_shift[j];
      if (problem.residual) y[j] += added[j];
      if (problem.relu) y[j] = device::relu(y[j]);
    }
    thread.store(problem.y, thread.row + i * thread.down, y);
  }
}

// False, and no launch, where a grid cannot have as many blocks.
template <typename T, typename Launch>
bool scale_shift_add_relu(const ScaleShiftAddReluProblem<T>& problem, Launch&& launch) {
  return launch_pass<T>(
      problem, kForwardAhead, [](auto width) { return scale_shift_add_relu_kernel<T, width.value>; }, launch);
}

}  // namespace fusedres::cuda
