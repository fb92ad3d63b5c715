// Winograd's F(2x2, 3x3): a square of 2x2 outputs from 4x4 inputs with 16 products where the direct sum has 36
// (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016).
//
// Inputs d, filter g and products m of one square and pair of channels are (4, 4), (3, 3) and (4, 4):
//   m = (B^T d B) * (G g G^T), outputs A^T m A.
// Products of all channels are added up before A, so that 16 matrix products of squares by channels are left, one for
// each of the (4, 4) frequencies. A, B and G hold 0, 1, -1 and 1/2, and every output depends on the very inputs that
// the direct sum reads.
#pragma once

#include <optional>

#include "cpu/conv_gather.h"

namespace fusedres::cpu {

constexpr int64_t kFrequencies = 16;

// Along one axis square i covers the outputs start(i) and, where that is inside, start(i) + step; its inputs are those
// from start(i) + offset on, `step` apart. The outputs of each residue modulo `step` are paired among themselves.
struct WinogradAxis {
  int64_t points, step, offset;
  bool is_reversed;  // taps meet inputs in falling order, as those of an input gradient do

  // The first points % step residues have one output more than the others.
  int64_t longer() const { return points % step; }
  int64_t squares_of_longer() const { return (points / step + 2) / 2; }
  int64_t squares_of_others() const { return (points / step + 1) / 2; }
  int64_t squares() const { return longer() * squares_of_longer() + (step - longer()) * squares_of_others(); }
  int64_t start(int64_t i) const {
    const int64_t in_longer = longer() * squares_of_longer();
    const auto start = [&](int64_t at, int64_t each) { return at / each + 2 * step * (at % each); };
    return i < in_longer ? start(i, squares_of_longer()) : longer() + start(i - in_longer, squares_of_others());
  }
};

struct WinogradGrid {
  WinogradAxis h, w;

  int64_t squares() const { return h.squares() * w.squares(); }  // of one image
};

// Nothing where the gather is no 3x3 conv of stride 1, or where it would not pay: few channels leave the transforms
// nothing to save, small maps have squares that are mostly outside. Nor where a map is one square high or wide: outputs
// of a square share their roundings, which then do not cancel in BN's sums.
std::optional<WinogradGrid> winograd_grid(const Gather& gather, int64_t depth, int64_t channels);

}  // namespace fusedres::cpu
