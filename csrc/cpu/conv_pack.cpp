#include "cpu/conv_pack.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/conv_pack_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

// The row at each offset; nothing where these are not all of [0, rows), as in a weight with gaps or an expanded one.
std::vector<int64_t> rows_at(const std::vector<int64_t>& offsets) {
  const int64_t count = offsets.size();
  std::vector<int64_t> rows(count, -1);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = offsets[row];
    if (!is_within(at, count) || rows[at] >= 0) return {};
    rows[at] = row;
  }
  return rows;
}

}  // namespace

WeightOrder::WeightOrder(const ConvPlan& plan, const WeightStrides& strides)
    : step(strides.K), is_tap_after_tap(strides.C == 1) {
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
  if (plan.winograd) {
    std::vector<int64_t> by_channel;
    for (int64_t c = 0; c < plan.sizes.depth; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) by_channel.push_back(offsets[tap * plan.sizes.depth + c]);
    }
    offsets = std::move(by_channel);
  }
  rows = rows_at(offsets);
  is_in_order = step == 1 || std::is_sorted(rows.begin(), rows.end());
}

template <typename T>
void pack_weight(const ConvPlan& plan, const LooseWeight<T>& weight, T* packed) {
  if (plan.winograd) {
    const auto pack = FUSEDRES_OF_ISA(plan.tile.isa, winograd_pack<T>);
    return parallel_for_each(plan.panels,
                             [&](int64_t panel) { pack(plan, weight, panel, packed + panel * plan.panel_elements()); });
  }
  const Cut pieces = Cut::at_most(weight.order.offsets.size(), 256);
  const auto pack = FUSEDRES_OF_ISA(plan.tile.isa, conv_pack_piece<T>)(weight);
  parallel_for_each(plan.panels * pieces.count, [&](int64_t item) {
    const int64_t panel = item / pieces.count;
    pack(plan, weight, panel, pieces[item % pieces.count], 0, packed + panel * plan.panel_elements());
  });
}

#define FUSEDRES_CONV_PACK(T) template void pack_weight<T>(const ConvPlan&, const LooseWeight<T>&, T*);
FUSEDRES_CONV_PACK(float)
FUSEDRES_CONV_PACK(double)

}  // namespace fusedres::cpu
