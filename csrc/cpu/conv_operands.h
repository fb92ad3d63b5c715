// What the conv kernels read and write, and the buffers of one worker.
#pragma once

#include "cpu/conv_pack.h"

namespace fusedres::cpu {

// x (N, in_h, in_w, in_pixel); packed: panels of the weight, or `loose` where the plan packs them;
// y (N, out_h, out_w, K) = act(scale*sum + bias + residual).
template <typename T>
struct ConvOperands {
  const T* x;
  const T* packed;
  T* y;
  WeightView<T> weight;
  const LooseWeight<T>* loose = nullptr;
  const T *scale = nullptr, *bias = nullptr;  // (K,) or one and zero
  // Lies on every residual_h-th row and residual_w-th column of y.
  const T* residual = nullptr;
  int64_t residual_h = 1, residual_w = 1;
  bool relu = false;

  // The residual's channels for a pixel of y, null where there are none.
  const T* residual_of(const ConvSizes& sizes, int64_t image, int64_t row, int64_t col) const {
    if (residual == nullptr || row % residual_h != 0 || col % residual_w != 0) return nullptr;
    const int64_t rows = ceil_div(sizes.out_h, residual_h), cols = ceil_div(sizes.out_w, residual_w);
    return residual + ((image * rows + row / residual_h) * cols + col / residual_w) * sizes.K;
  }
};

// What one block of points needs: addresses, and buffers.
template <typename T>
struct ConvTable {
  std::vector<const T*> inputs;    // (tiles, taps, tile.points)
  std::vector<bool> is_padding;    // (tiles, taps) for all pixels of the tile
  std::vector<int64_t> outputs;    // (pixels,) the first channel's index in y
  std::vector<const T*> residual;  // (pixels,) null where there is none
  std::vector<T> zeros;            // (depth,) what a tap in the padding reads
  std::vector<T> sums;             // (panels, tiles, tile.points, tile.channels)
  std::vector<T> panel;            // (rows of a run, tile.channels) where the plan packs panels
  std::vector<T> squares;          // (kFrequencies, points, depth), frequencies square_step apart
  int64_t square_step = 0;
  int64_t block = -1;  // what the table was made for

  // For the pixels of block `index`.
  void build(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t index);
};

template <typename T>
void ConvTable<T>::build(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t index) {
  if (index == block) return;
  block = index;
  const ConvSizes& sizes = plan.sizes;
  const GatherAxis &h = plan.gather.h, &w = plan.gather.w;
  const Range pixels = plan.point_block(index);
  const Cut tiles = Cut::at_most(pixels.size(), plan.tile.points);
  const int64_t taps = plan.gather.taps();
  inputs.resize(tiles.count * taps * plan.tile.points);
  is_padding.resize(tiles.count * taps);
  outputs.resize(pixels.size());
  residual.assign(pixels.size(), nullptr);
  zeros.resize(sizes.depth);
  const int64_t row_elements = sizes.in_w * sizes.in_pixel;
  int64_t col = pixels.begin % w.points, row = pixels.begin / w.points % h.points,
          image = pixels.begin / plan.gather.pixels(), at = 0;
  struct Place {
    int64_t row, col;
    const T* x;  // the pixel there, which may be outside
  };
  std::vector<Place> places(plan.tile.points);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t count = tiles[tile].size();
    for (int64_t i = 0; i < count; ++i, ++at) {
      const int64_t in_row = row * h.in_step, in_col = col * w.in_step;
      const int64_t pixel = (image * sizes.in_h + in_row) * sizes.in_w + in_col;
      places[i] = {in_row, in_col, operands.x + pixel * sizes.in_pixel};
      const int64_t out_row = h.out_begin + row * h.out_step, out_col = w.out_begin + col * w.out_step;
      outputs[at] = ((image * sizes.out_h + out_row) * sizes.out_w + out_col) * sizes.K;
      residual[at] = operands.residual_of(sizes, image, out_row, out_col);
      if (++col == w.points) {
        col = 0;
        if (++row == h.points) row = 0, ++image;
      }
    }
    int64_t tap = tile * taps;
    for (const int64_t h_offset : h.offsets) {
      for (const int64_t w_offset : w.offsets) {
        const T** const to = inputs.data() + tap * plan.tile.points;
        const int64_t offset = h_offset * row_elements + w_offset * sizes.in_pixel;
        bool is_read = false;
        for (int64_t i = 0; i < count; ++i) {
          const bool is_inside =
              is_within(places[i].row + h_offset, sizes.in_h) & is_within(places[i].col + w_offset, sizes.in_w);
          to[i] = is_inside ? places[i].x + offset : zeros.data();
          is_read |= is_inside;
        }
        is_padding[tap++] = !is_read;
      }
    }
  }
}

}  // namespace fusedres::cpu
