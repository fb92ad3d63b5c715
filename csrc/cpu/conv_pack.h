// The order in which conv kernels read a weight: panels of output channels, (taps, depth, tile.channels) for the direct
// sum, (kFrequencies, depth, tile.channels) for Winograd's.
#pragma once

#include "cpu/conv_plan.h"

namespace fusedres::cpu {

// Where the weight of output channel k, filter tap (r, s) and input channel c is: w[k*K + r*R + s*S + c*C]. A tap of
// the gather may be a run of the filter's, from column s on, each of `channels`.
struct WeightStrides {
  int64_t K, R, S, C, channels;

  bool operator==(const WeightStrides& other) const {
    return K == other.K && R == other.R && S == other.S && C == other.C && channels == other.channels;
  }
  bool operator!=(const WeightStrides& other) const { return !(*this == other); }
};

template <typename T>
struct WeightView {
  const T* w;
  WeightStrides strides;
};

// How a plan reads a weight of such strides: the weights of one output channel as rows that a panel has or is made
// from.
struct WeightOrder {
  WeightOrder(const ConvPlan& plan, const WeightStrides& strides);

  int64_t step;  // between output channels
  std::vector<int64_t>
      offsets;                // of the rows in memory: (taps, depth) for the direct sum, (depth, taps) for Winograd's
  std::vector<int64_t> rows;  // the row at each offset, where one channel's weights lie side by side; else empty
  bool is_in_order;           // a run of places in memory is the same run of rows
  bool is_tap_after_tap;      // every tap's channels lie side by side
};

// A weight as it lies in memory.
template <typename T>
struct LooseWeight {
  const T* w;
  const WeightOrder& order;
};

// Fills `packed` (plan.packed_elements()); lanes past the last output channel are zero.
template <typename T>
void pack_weight(const ConvPlan& plan, const LooseWeight<T>& weight, T* packed);

}  // namespace fusedres::cpu
