#include "cpu/conv_plan.h"

namespace fusedres::cpu {
namespace {

// A run of a panel is meant to be near while the tiles of a block pass it: `kRun` steps of the depth for every channel
// of the panel, for wider vectors come with larger caches. Pixels of a block, as far as one run reads them, and its
// sums for a block of panels are meant for the second-level cache.
constexpr int64_t kRun = 36;
constexpr int64_t kBlockTiles = 16, kBlockPanels = 16;
constexpr int64_t kTasksEach = 4;  // at least, for every worker, so that none waits long for the last
// Squares of a block: as many as leave their transformed inputs in the caches.
constexpr int64_t kBlockSquares = 36;
// Points that make one block where a panel is packed for all that it meets.
constexpr int64_t kFewPixels = 256, kFewSquares = 60;

// Into how many blocks to cut the panels, `least` or more: more of them where that leaves the busiest worker less to
// do.
int64_t count_panel_blocks(int64_t panels, int64_t pixel_blocks, int64_t workers, int64_t least) {
  const auto busiest = [&](int64_t count) { return ceil_div(pixel_blocks * count, workers) * ceil_div(panels, count); };
  int64_t best = least;
  for (int64_t count = least + 1; count <= std::min(panels, 4 * least); ++count) {
    if (32 * busiest(count) < 31 * busiest(best)) best = count;
  }
  return best;
}

}  // namespace

ConvPlan::ConvPlan(const ConvSizes& sizes, Gather unplanned, ConvTile tile, int64_t workers, Weights weights)
    : sizes(sizes),
      gather(std::move(unplanned)),
      winograd(winograd_grid(gather, sizes.depth, sizes.K)),
      tile(tile),
      panels(ceil_div(sizes.K, tile.channels)),
      runs(Cut::at_most(sizes.depth, kRun * tile.channels)),
      taps_at_once(std::max<int64_t>(kRun * tile.channels / std::max<int64_t>(sizes.depth, 1), 1)) {
  const int64_t tiles = ceil_div(points(), tile.points);
  const bool are_few = tiles > 0 && points() <= (winograd ? kFewSquares : kFewPixels);
  packs_panels = weights == Weights::kLoose && are_few && panels >= kTasksEach * workers;
  if (packs_panels) {
    tile_blocks = {tiles, 1};
    panel_blocks = {panels, kTasksEach * workers};
    return;
  }
  const int64_t block_tiles = winograd ? kBlockSquares / tile.points : kBlockTiles;
  tile_blocks = tiles > 0 ? Cut::at_most(tiles, block_tiles) : Cut(0, 0);
  const int64_t wanted = ceil_div(kTasksEach * workers, std::max<int64_t>(tile_blocks.count, 1));
  const int64_t least = std::clamp(wanted, std::min(ceil_div(panels, kBlockPanels), panels), panels);
  panel_blocks = {panels, count_panel_blocks(panels, tile_blocks.count, workers, least)};
}

}  // namespace fusedres::cpu
