// What a weight gradient reads, and the buffers between its steps: shared by the driver and the kernels of every
// instruction set.
#pragma once

#include "cpu/dtypes.h"
#include "cpu/wgrad_plan.h"

namespace fusedres::cpu {

// An activation (N, H, W, channels) and what happens to it while it is packed. Without factors, bn and mean: nothing.
template <typename T>
struct WgradOperand {
  const T* data;
  int64_t channels, H, W, numel;
  // BN backward, a*g + b*(z - mean) + c: z like data, factors (4, channels) of factors.h.
  const T* z = nullptr;
  const acc_t<T>* factors = nullptr;
  // relu(scale*x + shift): bn (4, channels) of fusedres/ops.py.
  const acc_t<T>* bn = nullptr;
  // Subtracted last: mean (channels,).
  const acc_t<T>* mean = nullptr;
};

// The panels of one side of a tile: its channels cut into runs that a micro-tile holds, `unit` channels at a time.
struct WgradPanels {
  int64_t extent, unit;
  Cut cut;

  WgradPanels(int64_t extent, int64_t unit, int64_t most_units)
      : extent(extent), unit(unit), cut(Cut::at_most(ceil_div(extent, unit), most_units)) {}

  int64_t count() const { return cut.count; }
  int64_t begin(int64_t i) const { return unit * cut.begin(i); }
  int64_t units(int64_t i) const { return cut[i].size(); }
  int64_t width(int64_t i) const { return unit * units(i); }                           // in memory
  int64_t channels(int64_t i) const { return std::min(extent - begin(i), width(i)); }  // with meaning

  // A panel holds its pixels one after the other; the last may spill into the gap behind it.
  static constexpr int64_t kGap = 16;
  int64_t offset(int64_t i, int64_t pixels) const { return begin(i) * pixels + i * kGap; }
  int64_t elements(int64_t pixels) const { return offset(count(), pixels); }
};

// One tile as `count` partial sums, a fixed distance apart.
template <typename Tile>
struct WgradPartials {
  const Tile* first;
  int64_t count, distance;
};

// Sizes in elements of the buffers of one task: both packed sides and the tile. And the row panels of a tile.
struct WgradBuffers {
  int64_t row_side, vector_side, tile, row_panels;
};

}  // namespace fusedres::cpu
