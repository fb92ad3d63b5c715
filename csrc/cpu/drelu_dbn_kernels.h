// The backward tail: masked gradient and the sums of up to two BNs, in one pass. Included per instruction set.

#include "cpu/prologue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// kRows rows: g = masked dy, sums[0] += g and, for the i-th of kBranches, sums[1 + i] += g*(z_i - mean_i).
template <int kRows, Mask kMask, int kBranches, typename T>
FUSEDRES_INLINE void drelu_dbn_rows(const BackwardTail& tail, int64_t offset, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t channels = tail.channels;
  const T* dy = static_cast<const T*>(tail.dy) + offset;
  const T* y = kMask == Mask::output ? static_cast<const T*>(tail.y) + offset : nullptr;
  const T* z[2] = {};
  const Acc* bn[2] = {};
  for (int i = 0; i < kBranches; ++i) {
    z[i] = static_cast<const T*>(tail.z[i]) + offset;
    bn[i] = static_cast<const Acc*>(tail.bn[i]);
  }
  T* g = static_cast<T*>(tail.g) + offset;
  for_each_vector<T>(channels, [=](auto lanes, int64_t c) {
    V dbeta{}, dgamma[2]{};
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = row * channels + c;
      V z_value[2], gradient = lanes.load(dy + at);
      for (int i = 0; i < kBranches; ++i) z_value[i] = lanes.load(z[i] + at);
      if constexpr (kMask == Mask::output) gradient = drelu(gradient, lanes.load(y + at));
      if constexpr (kMask == Mask::recomputed) {
        const V activated =
            bn_apply(lanes.load(bn[0] + 2 * channels + c), z_value[0], lanes.load(bn[0] + 3 * channels + c));
        gradient = drelu(gradient, activated);
      }
      lanes.store(g + at, gradient);
      dbeta += gradient;
      for (int i = 0; i < kBranches; ++i) dgamma[i] += gradient * (z_value[i] - lanes.load(bn[i] + c));
    }
    lanes.store(sums + c, lanes.load(sums + c) + dbeta);
    for (int i = 0; i < kBranches; ++i) {
      Acc* sum = sums + (1 + i) * channels + c;
      lanes.store(sum, lanes.load(sum) + dgamma[i]);
    }
  });
}

// Rows [begin, end). state (1 + kBranches, channels) gets their sums; scratch of the same size holds float runs of at
// most kRunRows rows, four at a time.
template <typename T, Mask kMask, int kBranches>
void drelu_dbn(const BackwardTail& tail, int64_t begin, int64_t end, double* __restrict state, void* run_sums) {
  auto* __restrict sums = static_cast<acc_t<T>*>(run_sums);
  const int64_t channels = tail.channels, count = (1 + kBranches) * channels;
  for (int64_t i = 0; i < count; ++i) state[i] = sums[i] = 0;
  for (int64_t run = begin; run < end; run += kRunRows) {
    const int64_t run_end = end - run < kRunRows ? end : run + kRunRows;
    int64_t row = run;
    for (; row + 4 <= run_end; row += 4) drelu_dbn_rows<4, kMask, kBranches, T>(tail, row * channels, sums);
    for (; row < run_end; ++row) drelu_dbn_rows<1, kMask, kBranches, T>(tail, row * channels, sums);
    for (int64_t i = 0; i < count; ++i) {
      state[i] += sums[i];
      sums[i] = 0;
    }
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
