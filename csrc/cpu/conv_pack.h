// The order in which conv kernels read a weight: panels (taps, depth, tile.channels) of output channels.
#pragma once

#include "cpu/conv_plan.h"

namespace fusedres::cpu {

// Where the weight of output channel k, filter tap (r, s) and input channel c is: w[k*K + r*R + s*S + c*C]. A tap of
// the gather may be a run of the filter's, from column s on, each of `channels`.
struct WeightStrides {
  int64_t K, R, S, C, channels;
};

template <typename T>
struct WeightView {
  const T* w;
  WeightStrides strides;
};

// What one output channel has at each place of a panel: the rows of a panel, and where they are in memory.
struct PanelRows {
  PanelRows(const ConvPlan& plan, const WeightStrides& strides);

  std::vector<int64_t> offsets;  // (taps * depth,) of each row
  std::vector<int64_t> rows;     // the row at each offset, where one channel's weights lie side by side; else empty
};

// A weight as it lies in memory, and how a plan reads it.
template <typename T>
struct LooseWeight {
  LooseWeight(const ConvPlan& plan, const WeightView<T>& weight);

  const T* w;
  int64_t step;  // between output channels
  PanelRows rows;
  bool is_in_order;  // a run of places in memory is the same run of rows
};

// Fills `packed` (plan.packed_elements()); lanes past the last output channel are zero.
template <typename T>
void pack_weight(const ConvPlan& plan, const LooseWeight<T>& weight, T* packed);

}  // namespace fusedres::cpu
