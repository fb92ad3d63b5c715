// Convolution of one block of points by one block of panels. Included by foreach_isa.h, per instruction set.

#include "cpu/conv_pack_kernels.h"
#include "cpu/conv_tile_kernels.h"
#include "cpu/winograd_kernels.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// The given rows of a panel, packed before or now. Where memory has the rows in another order, all of them with the
// first.
template <typename T>
const T* conv_panel_rows(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t panel, Range rows,
                         ConvTable<T>& table) {
  if (operands.loose == nullptr) {
    return operands.packed + panel * plan.panel_elements() + rows.begin * kConvChannels<T>;
  }
  const LooseWeight<T>& weight = *operands.loose;
  const auto pack = conv_pack_piece<T>(weight);
  if (!weight.order.is_in_order) {
    const int64_t all = plan.gather.taps() * plan.sizes.depth;
    table.panel.resize(all * kConvChannels<T>);
    if (rows.begin == 0) pack(plan, weight, panel, {0, all}, 0, table.panel.data());
    return table.panel.data() + rows.begin * kConvChannels<T>;
  }
  table.panel.resize(rows.size() * kConvChannels<T>);
  pack(plan, weight, panel, rows, rows.begin, table.panel.data());
  return table.panel.data();
}

// The pixels of a block by some panels. Long sums are cut into runs, whose totals are added.
template <typename T>
void conv_panels(const ConvPlan& plan, const ConvOperands<T>& operands, const Cut& tiles, Range panels,
                 ConvTable<T>& table) {
  const int64_t taps = plan.gather.taps(), depth = plan.sizes.depth;
  const bool is_one_run = taps <= plan.taps_at_once && plan.runs.count == 1;
  table.sums.resize(is_one_run ? kConvTile<T> : panels.size() * tiles.count * kConvTile<T>);
  ConvAhead<T> ahead;
  if (operands.loose != nullptr) ahead = conv_ahead(*operands.loose, panels.end);
  int64_t tap = 0;
  do {
    const int64_t run_taps = std::min(plan.taps_at_once, taps - tap);
    for (int64_t run = 0; run < plan.runs.count; ++run) {
      const Range channels = plan.runs[run];
      const bool is_first = tap == 0 && run == 0, is_last = tap + run_taps == taps && run + 1 == plan.runs.count;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t first_row = tap * depth + channels.begin;
        const Range rows{first_row, first_row + run_taps * channels.size()};
        const T* const panel = conv_panel_rows(plan, operands, p, rows, table);
        if (operands.loose == nullptr) {
          const bool comes_next = p + 1 < panels.end || is_last;  // or the first panel with the next run
          const T* const next =
              comes_next ? panel + plan.panel_elements()
                         : operands.packed + panels.begin * plan.panel_elements() + rows.end * kConvChannels<T>;
          ahead = {next, next + rows.size() * kConvChannels<T>};
        }
        const int64_t channel = p * kConvChannels<T>;
        const int64_t width = std::min(kConvChannels<T>, plan.sizes.K - channel);
        for (int64_t t = 0; t < tiles.count; ++t) {
          T* sums = table.sums.data() + (is_one_run ? 0 : ((p - panels.begin) * tiles.count + t) * kConvTile<T>);
          const Range pixels = tiles[t];
          const T* const* inputs = table.inputs.data() + (t * taps + tap) * kConvPoints;
          if (p == panels.begin && t + 1 < tiles.count) {
            for (int64_t i = 0; i < run_taps * kConvPoints; ++i) {
              conv_prefetch(inputs[taps * kConvPoints + i] + channels.begin, channels.size());
            }
          }
          if (is_last) {
            for (int64_t i = pixels.begin; i < pixels.end; ++i) {
              if (table.residual[i] != nullptr) conv_prefetch(table.residual[i] + channel, width);
            }
          }
          const ConvFinish<T> finish{&operands, table.outputs.data() + pixels.begin,
                                     table.residual.data() + pixels.begin, channel};
          const bool is_whole = width == kConvChannels<T>;
          const bool is_read = run_taps != 1 || !table.is_padding[t * taps + tap];
          if (is_read) {
            conv_micro_tile_of<T>(pixels.size())(inputs, run_taps, channels.begin, channels.size(), panel, sums,
                                                 is_first, is_last && is_whole ? &finish : nullptr,
                                                 ahead.take(rows.size(), panel));
          } else if (is_first) {
            std::fill_n(sums, kConvTile<T>, T{0});
          }
          if (is_last && !(is_whole && is_read)) conv_finish_sums(finish, sums, pixels.size(), width);
        }
      }
    }
    tap += run_taps;
  } while (tap < taps);
}

// One task of the plan: the pixels of a block by its panels. Those that are packed on the way come one by one.
template <typename T>
void conv_block(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t task, ConvTable<T>& table) {
  if (plan.winograd) return winograd_block(plan, operands, task, table);
  const int64_t block = task / plan.panel_blocks.count;
  const Range panels = plan.panel_blocks[task % plan.panel_blocks.count];
  const Cut tiles = Cut::at_most(plan.point_block(block).size(), kConvPoints);
  table.build(plan, operands, block);
  if (!plan.packs_panels) return conv_panels(plan, operands, tiles, panels, table);
  for (int64_t p = panels.begin; p < panels.end; ++p) conv_panels(plan, operands, tiles, {p, p + 1}, table);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
