// How a weight gradient is cut into tasks. dw[k, tap, c] = sum over pixels of g[pixel, k] * x[pixel at tap, c].
//
// A task is one tile of dw (channels of K by channels of C, all taps) over one chunk of the pixels. It goes through its
// chunk block by block: both operands' pixels are packed, prologues applied, into buffers that fit the second-level
// cache, and multiplied there. Where dw has too few tiles to share among threads there are several chunks, and their
// partial tiles are added up in order at the end. The plan follows from the problem alone: no result depends on the
// number of threads.
#pragma once

#include "cpu/wgrad_geometry.h"

namespace fusedres::cpu {

struct WgradProblem {
  int64_t N, K, C;
  ConvAxis h, w;
  bool symmetric = false;     // g is x itself: only the lower half of dw (K = C, one tap) is computed, and mirrored
  int64_t longest_run = 448;  // pixels whose products are added in the accumulation type, before the tile's takes over
};

// A block of outputs, and of the inputs (in the numbers of TapAxis) that they meet.
struct WgradBlock {
  Range images, g_rows, g_cols, x_rows, x_cols;

  int64_t g_pixels() const { return images.size() * g_rows.size() * g_cols.size(); }
  int64_t x_pixels() const { return images.size() * x_rows.size() * x_cols.size(); }
};

class WgradPlan {
 public:
  explicit WgradPlan(const WgradProblem& problem);

  int64_t tiles() const { return k_tiles_.count * c_tiles_.count; }
  int64_t chunks() const { return chunks_.count; }
  int64_t taps() const { return h.axis.kernel * w.axis.kernel; }
  Range k_range(int64_t tile) const { return channels(k_tiles_[tile / c_tiles_.count], problem.K); }
  Range c_range(int64_t tile) const { return channels(c_tiles_[tile % c_tiles_.count], problem.C); }
  // Whether no element of the tile lies in the lower half.
  bool skips(int64_t tile) const { return problem.symmetric && k_range(tile).end <= c_range(tile).begin; }

  Range blocks(int64_t chunk) const { return chunks_[chunk]; }
  WgradBlock block(int64_t index) const;

  // The most that any block has.
  int64_t largest_g_pixels() const { return images_.largest() * rows_.largest() * cols_.largest(); }
  int64_t largest_x_pixels() const;

  WgradProblem problem;
  TapAxis h, w;
  // Micro-tiles broadcast one operand and load vectors of the other. Vectors run along C, or along K where C is too
  // small to fill one.
  bool vectors_along_k;

 private:
  static constexpr int64_t kUnit = 16;  // tiles are multiples of this many channels

  static Range channels(Range units, int64_t extent) { return clip({units.begin * kUnit, units.end * kUnit}, extent); }

  Cut k_tiles_, c_tiles_;
  Cut images_, rows_, cols_;  // of a block
  Cut chunks_;                // of the blocks
};

}  // namespace fusedres::cpu
