#include "cpu/conv_pack.h"

#include "cpu/parallel.h"

namespace fusedres::cpu {

namespace {

// Channels [begin, end) of every filter column that makes up tap `tap`, for one panel.
template <typename T>
void pack_piece(const ConvPlan& plan, const T* w, const WeightStrides& strides, int64_t panel, int64_t tap, Range depth,
                T* packed) {
  const GatherAxis &h = plan.gather.h, &v = plan.gather.w;
  const int64_t width = plan.tile.channels, first = panel * width, columns = v.taps.size();
  const int64_t channels = std::min(width, plan.sizes.K - first);
  const T* from = w + first * strides.K + h.taps[tap / columns] * strides.R + v.taps[tap % columns] * strides.S;
  T* to = packed + panel * plan.panel_elements() + tap * plan.sizes.depth * width;
  for (int64_t column = 0; column < plan.sizes.depth / strides.channels; ++column, from += strides.S) {
    T* row = to + (column * strides.channels + depth.begin) * width;
    for (int64_t c = depth.begin; c < depth.end; ++c, row += width) {
      for (int64_t k = 0; k < channels; ++k) row[k] = from[k * strides.K + c * strides.C];
      std::fill(row + channels, row + width, T{0});
    }
  }
}

}  // namespace

// Along the axis that is dense in memory, so that few pages are read at a time.
template <typename T>
void pack_weight(const ConvPlan& plan, const T* w, const WeightStrides& strides, T* packed) {
  const int64_t taps = plan.gather.taps();
  if (strides.C <= strides.K) {
    return parallel_for_each(plan.panels * taps, [&](int64_t item) {
      pack_piece(plan, w, strides, item / taps, item % taps, {0, strides.channels}, packed);
    });
  }
  const Cut blocks = Cut::at_most(strides.channels, 16);
  parallel_for_each(blocks.count * taps, [&](int64_t item) {
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      pack_piece(plan, w, strides, panel, item % taps, blocks[item / taps], packed);
    }
  });
}

template void pack_weight<float>(const ConvPlan&, const float*, const WeightStrides&, float*);
template void pack_weight<double>(const ConvPlan&, const double*, const WeightStrides&, double*);

}  // namespace fusedres::cpu
