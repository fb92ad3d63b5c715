// Sums over rows: blocks on all threads, their totals joined in a fixed order, written as a BN's sums.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace fusedres::cpu {

// `count` sums over all rows, (count, blocks.channels). kernel(block, state, scratch) writes those of one block to its
// channels of state (count, blocks.channels); scratch holds count * block.width.
template <typename Acc, typename Kernel>
std::vector<double> reduce(const Blocks& blocks, int64_t count, const Kernel& kernel) {
  const int64_t size = count * blocks.channels;
  std::vector<double> state(blocks.down() * size);
  parallel_for_each(blocks.count(), [&](int64_t i) {
    const Block block = blocks[i];
    std::vector<Acc> scratch(count * block.width);
    kernel(block, state.data() + i / blocks.across() * size, scratch.data());
  });
  std::vector<double> total(size);
  for (size_t at = 0; at < state.size(); at += size) {
    for (int64_t i = 0; i < size; ++i) total[i] += state[at + i];
  }
  return total;
}

// sums (2, channels) or, without `centred`, (1, channels): dbeta, dgamma = invstd * sum(g*(z - mean)).
template <typename Acc>
void write_sums(const double* dbeta, const double* centred, const Acc* bn, int64_t channels, Acc* sums) {
  for (int64_t c = 0; c < channels; ++c) {
    sums[c] = dbeta[c];
    if (centred != nullptr) sums[channels + c] = bn[channels + c] * centred[c];
  }
}

}  // namespace fusedres::cpu
