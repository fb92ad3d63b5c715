// The per-channel factors of dz = a*g + b*(z - mean) + c, computed once per op.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedres::cpu {

// (4, channels): a = scale, b = -scale*invstd*dgamma*inv_count, c = -scale*dbeta*inv_count, mean.
// bn (4, channels) and sums (2, channels) as in fusedres/ops.py. Where the statistics are constants (inv_count 0), b
// and c are 0 even if the sums are NaN.
template <typename Acc>
std::vector<Acc> dbn_factors(const Acc* bn, const Acc* sums, int64_t channels, double inv_count) {
  std::vector<Acc> factors(4 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = bn[c], invstd = bn[channels + c], scale = bn[2 * channels + c];
    factors[c] = scale;
    factors[channels + c] = inv_count == 0 ? 0 : -scale * invstd * sums[channels + c] * inv_count;
    factors[2 * channels + c] = inv_count == 0 ? 0 : -scale * sums[c] * inv_count;
    factors[3 * channels + c] = mean;
  }
  return factors;
}

}  // namespace fusedres::cpu
