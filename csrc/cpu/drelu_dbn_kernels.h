// The backward tail: masked gradient and the sums of up to two BNs, in one pass. Included per instruction set.

#include "cpu/prologue.h"
#include "cpu/running_sums.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// One row of a block, its first element at `at`: g = masked dy, sums[0] += g and, for the i-th of kBranches,
// sums[1 + i] += g*(z_i - mean_i). sums (1 + kBranches, block.width).
template <Mask kMask, int kBranches, typename T>
FUSEDRES_INLINE void drelu_dbn_row(const BackwardTail& tail, const Block& block, int64_t at, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t channels = tail.channels, width = block.width;
  const T* dy = static_cast<const T*>(tail.dy) + at;
  const T* y = kMask == Mask::output ? static_cast<const T*>(tail.y) + at : nullptr;
  const T* z[2] = {};
  const Acc* bn[2] = {};
  for (int i = 0; i < kBranches; ++i) {
    z[i] = static_cast<const T*>(tail.z[i]) + at;
    bn[i] = static_cast<const Acc*>(tail.bn[i]) + block.channel;
  }
  T* g = static_cast<T*>(tail.g) + at;
  for_each_vector<T>(width, [=](auto lanes, int64_t c) {
    V z_value[2], gradient = lanes.load(dy + c);
    for (int i = 0; i < kBranches; ++i) z_value[i] = lanes.load(z[i] + c);
    if constexpr (kMask == Mask::output) gradient = drelu(gradient, lanes.load(y + c));
    if constexpr (kMask == Mask::recomputed) {
      const Acc *scale = bn[0] + 2 * channels, *shift = bn[0] + 3 * channels;
      gradient = drelu(gradient, bn_apply(lanes.load(scale + c), z_value[0], lanes.load(shift + c)));
    }
    lanes.store(g + c, gradient);
    lanes.store(sums + c, lanes.load(sums + c) + gradient);
    for (int i = 0; i < kBranches; ++i) {
      Acc* sum = sums + (1 + i) * width + c;
      lanes.store(sum, lanes.load(sum) + gradient * (z_value[i] - lanes.load(bn[i] + c)));
    }
  });
}

// One block; its totals go to state (1 + kBranches, tail.channels) at its channels. scratch (1 + kBranches,
// block.width).
template <typename T, Mask kMask, int kBranches>
void drelu_dbn(const BackwardTail& tail, const Block& block, double* state, void* scratch) {
  RunningSums<acc_t<T>> sums(1 + kBranches, block.width, state + block.channel, tail.channels, scratch);
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    drelu_dbn_row<kMask, kBranches, T>(tail, block, row * tail.channels + block.channel, sums.run);
    sums.end_row();
  }
  sums.flush();
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
