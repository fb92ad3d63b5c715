// The end of a reduction over rows: chunk totals joined in order, and written as a BN's sums.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedres::cpu {

// state (chunks, size) -> (size), added in the order of the chunks.
inline std::vector<double> total(const std::vector<double>& state, int64_t size) {
  std::vector<double> sums(size);
  for (size_t chunk = 0; chunk < state.size(); chunk += size)
    for (int64_t i = 0; i < size; ++i) sums[i] += state[chunk + i];
  return sums;
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
