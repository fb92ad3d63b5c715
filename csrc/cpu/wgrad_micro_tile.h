// The inner product of a weight gradient: a micro-tile of dw kept in registers over all pixels of a packed block.
// Included by wgrad_kernels.h, per instruction set.

#include "cpu/micro_tile.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// The low and wide shape is for sides with few rows, which the tall one could not keep busy.
constexpr int kTallRows = kMicroRows, kTallVectors = kMicroVectors;
constexpr int kWideRows = kTallRows / 2, kWideVectors = 2 * kTallVectors;
constexpr int kMicroTileVectors = kTallRows * kTallVectors;

// Pixels of one tap in a packed block, as three nested loops over both sides; distances in pixels.
struct WgradWalk {
  int64_t images, rows, cols;
  struct Side {
    int64_t begin, image, row;
  } row_side, vector_side;

  // Loops that run on without a gap become one.
  void collapse() {
    if (row_side.image == rows * row_side.row && vector_side.image == rows * vector_side.row)
      rows *= images, images = 1;
    if (row_side.row == cols && vector_side.row == cols) cols *= rows, rows = 1;
  }
};

// tile[row][lane] += sum over the walk of row_side[pixel][row] * vector_side[pixel][lane].
template <typename Lane, typename Tile, int kRows, int kVectors>
void wgrad_micro_tile(const WgradWalk& walk, const Lane* row_side, const Lane* vector_side, Tile* tile) {
  constexpr int kWidth = FUSEDRES_VECTOR_BYTES / sizeof(Lane);
  Vec<Lane> acc[kRows][kVectors] = {};
  for (int64_t n = 0; n < walk.images; ++n) {
    for (int64_t p = 0; p < walk.rows; ++p) {
      const Lane* a = row_side + (walk.row_side.begin + n * walk.row_side.image + p * walk.row_side.row) * kRows;
      const Lane* b = vector_side + (walk.vector_side.begin + n * walk.vector_side.image + p * walk.vector_side.row) *
                                        kVectors * kWidth;
      for (int64_t q = walk.cols; q > 0; --q, a += kRows, b += kVectors * kWidth) {
        Vec<Lane> vectors[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) vectors[j] = load(b + j * kWidth);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
          const Vec<Lane> value = broadcast(a[i]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) acc[i][j] += value * vectors[j];
        }
      }
    }
  }
  if constexpr (std::is_same_v<Lane, Tile>) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Tile* to = tile + (i * kVectors + j) * kWidth;
        store(to, load(to) + acc[i][j]);
      }
    }
  } else {
    Lane sums[kRows * kVectors * kWidth];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(sums + (i * kVectors + j) * kWidth, acc[i][j]);
    }
    for (int i = 0; i < kRows * kVectors * kWidth; ++i) tile[i] += sums[i];
  }
}

template <typename Lane, typename Tile>
using WgradMicroTile = void (*)(const WgradWalk&, const Lane*, const Lane*, Tile*);

template <typename Lane, typename Tile, int kRows>
WgradMicroTile<Lane, Tile> wgrad_micro_tile_of(int64_t vectors) {
  if constexpr (kRows <= kWideRows) {
    if (vectors == 4) return wgrad_micro_tile<Lane, Tile, kRows, 4>;
    if (vectors == 3) return wgrad_micro_tile<Lane, Tile, kRows, 3>;
  }
  return vectors == 2 ? wgrad_micro_tile<Lane, Tile, kRows, 2> : wgrad_micro_tile<Lane, Tile, kRows, 1>;
}

template <typename Lane, typename Tile, int kRows = kTallRows>
WgradMicroTile<Lane, Tile> wgrad_micro_tile_of(int64_t rows, int64_t vectors) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return wgrad_micro_tile_of<Lane, Tile, kRows - 1>(rows, vectors);
  }
  return wgrad_micro_tile_of<Lane, Tile, kRows>(vectors);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
