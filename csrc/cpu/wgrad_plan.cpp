#include "cpu/wgrad_plan.h"

namespace fusedres::cpu {
namespace {

// Sizes in elements. A panel of one block is meant for the first-level cache, a tile and its two packed blocks for the
// second-level cache (512 KiB and more).
constexpr int64_t kTileElements = 64 << 10, kTileChannels = 256;
constexpr int64_t kBlockElements = 30 << 10, kBlockPixels = 192;  // at least so many pixels
constexpr int64_t kTasks = 16;  // enough to share among threads, few enough for the partial tiles
constexpr int64_t kNarrow = 8;  // fewer channels than this do not fill a vector

// A convolution that touches every pixel once is a plain product of matrices: one row of pixels, cut anywhere.
WgradProblem flattened(WgradProblem problem) {
  const auto is_dense = [](const ConvAxis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0; };
  if (!is_dense(problem.h) || !is_dense(problem.w)) return problem;
  const int64_t pixels = problem.N * problem.h.out * problem.w.out;
  problem.N = 1;
  problem.h = {1, 1, 1, 1, 0, 1};
  problem.w = {pixels, pixels, 1, 1, 0, 1};
  return problem;
}

// Channels of K and of C in a tile.
struct TileShape {
  int64_t k, c;
};

TileShape tile_shape(int64_t K, int64_t C, int64_t taps) {
  TileShape tile{std::min(K, kTileChannels), std::min(C, kTileChannels)};
  while (tile.k * tile.c * taps > kTileElements && std::max(tile.k, tile.c) > 1) {
    int64_t& larger = tile.k >= tile.c ? tile.k : tile.c;
    larger = ceil_div(larger, 2);
  }
  return tile;
}

}  // namespace

WgradPlan::WgradPlan(const WgradProblem& unflattened)
    : problem(flattened(unflattened)),
      h(problem.h),
      w(problem.w),
      vectors_along_k(problem.C < kNarrow && problem.K > problem.C) {
  const TileShape tile = tile_shape(problem.K, problem.C, taps());
  k_tiles_ = Cut::at_most(ceil_div(problem.K, kUnit), ceil_div(tile.k, kUnit));
  c_tiles_ = Cut::at_most(ceil_div(problem.C, kUnit), ceil_div(tile.c, kUnit));

  const int64_t P = problem.h.out, Q = problem.w.out;
  const int64_t pixels = std::min(std::max(kBlockElements / (tile.k + tile.c), kBlockPixels), problem.longest_run);
  cols_ = Cut::at_most(Q, pixels);
  rows_ = Cut::at_most(P, std::max<int64_t>(pixels / std::max<int64_t>(Q, 1), 1));
  images_ = Cut::at_most(problem.N, std::max<int64_t>(pixels / std::max<int64_t>(P * Q, 1), 1));

  const bool is_empty = problem.N * P * Q == 0;
  const int64_t blocks = is_empty ? 0 : images_.count * rows_.count * cols_.count;
  chunks_ = {blocks, std::clamp<int64_t>(ceil_div(kTasks, tiles()), 1, std::max<int64_t>(blocks, 1))};
}

WgradBlock WgradPlan::block(int64_t index) const {
  const Range cols = cols_[index % cols_.count];
  const Range rows = rows_[index / cols_.count % rows_.count];
  const Range images = images_[index / cols_.count / rows_.count];
  return {images, rows, cols, h.inputs(rows), w.inputs(cols)};
}

int64_t WgradPlan::largest_x_pixels() const {
  const auto extent = [](const ConvAxis& axis, int64_t outputs) {
    return std::min(axis.in, (outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1);
  };
  return images_.largest() * extent(h.axis, rows_.largest()) * extent(w.axis, cols_.largest());
}

}  // namespace fusedres::cpu
