#include "cpu/conv_pack.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/conv_pack_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {

PanelRows::PanelRows(const ConvPlan& plan, const WeightStrides& strides) {
  const int64_t count = plan.gather.taps() * plan.sizes.depth, columns = plan.sizes.depth / strides.channels;
  offsets.reserve(count);
  for (const int64_t r : plan.gather.h.taps) {
    for (const int64_t first : plan.gather.w.taps) {
      for (int64_t s = first; s < first + columns; ++s) {
        const int64_t tap = r * strides.R + s * strides.S;
        for (int64_t c = 0; c < strides.channels; ++c) offsets.push_back(tap + c * strides.C);
      }
    }
  }
  rows.resize(count);
  for (int64_t row = 0; row < count; ++row) {
    if (offsets[row] < 0 || offsets[row] >= count) {
      rows.clear();
      return;
    }
    rows[offsets[row]] = row;
  }
}

template <typename T>
void pack_weight(const ConvPlan& plan, const T* w, const WeightStrides& strides, T* packed) {
  const PanelRows rows(plan, strides);
  const Cut pieces = Cut::at_most(rows.offsets.size(), 256);
  const auto pack = FUSEDRES_BEST_ISA(conv_pack_piece<T>)(rows, strides.K);
  parallel_for_each(plan.panels * pieces.count, [&](int64_t item) {
    const int64_t first = item / pieces.count * plan.tile.channels;
    const int64_t channels = std::min(plan.tile.channels, plan.sizes.K - first);
    pack(rows, w + first * strides.K, strides.K, channels, pieces[item % pieces.count],
         packed + item / pieces.count * plan.panel_elements());
  });
}

template void pack_weight<float>(const ConvPlan&, const float*, const WeightStrides&, float*);
template void pack_weight<double>(const ConvPlan&, const double*, const WeightStrides&, double*);

}  // namespace fusedres::cpu
