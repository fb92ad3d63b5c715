#include "cpu/conv_plan.h"

namespace fusedres::cpu {
namespace {

// A run of one panel is meant for half the first-level cache (16 KiB of float32); the pixels of a block, as far as one
// run reads them, and its sums for a block of panels for the second-level cache.
constexpr int64_t kRun = 256;
constexpr int64_t kBlockTiles = 16, kBlockPanels = 16;
constexpr int64_t kTasksEach = 4;  // at least, for every worker, so that none waits long for the last

}  // namespace

ConvPlan::ConvPlan(const ConvSizes& sizes, Gather unplanned, ConvTile tile, int64_t workers)
    : sizes(sizes),
      gather(std::move(unplanned)),
      tile(tile),
      panels(ceil_div(sizes.K, tile.channels)),
      runs(Cut::at_most(sizes.depth, kRun)),
      taps_at_once(std::max<int64_t>(kRun / std::max<int64_t>(sizes.depth, 1), 1)) {
  const int64_t pixels = sizes.N * gather.pixels();
  pixel_blocks = pixels > 0 ? Cut::at_most(pixels, kBlockTiles * tile.pixels) : Cut(0, 0);
  const int64_t wanted = ceil_div(kTasksEach * workers, std::max<int64_t>(pixel_blocks.count, 1));
  const int64_t least = ceil_div(panels, kBlockPanels);
  panel_blocks = {panels, std::clamp(wanted, std::min(least, panels), panels)};
}

}  // namespace fusedres::cpu
