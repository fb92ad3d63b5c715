// Packing of weights into panels, in the three ways in which they lie in memory. Included by foreach_isa.h, per
// instruction set.

#include "cpu/micro_tile.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// A piece of panel `index`: runs of its rows, or of the places in memory where they are. to (rows, width), from row
// `first_row` on.
template <typename T>
using ConvPackPiece = void (*)(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, Range piece,
                               int64_t first_row, T* to);

// The output channels of panel `index`.
inline Range panel_channels(const ConvPlan& plan, int64_t index) {
  return clip({index * plan.tile.channels, (index + 1) * plan.tile.channels}, plan.sizes.K);
}

// The weights of one output channel lie side by side, in any order: squares of as many channels are turned.
template <typename T>
void conv_pack_turned(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, Range piece, int64_t first_row,
                      T* to) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  const Range range = panel_channels(plan, index);
  const int64_t step = weight.step, channels = range.size();
  const T* const w = weight.w + range.begin * step;
  const auto row_at = [&](int64_t at) { return to + (weight.rows.rows[at] - first_row) * kWidth; };
  for (int64_t first = 0; first < kWidth; first += kLanes<T>) {
    int64_t at = piece.begin;
    if (first + kLanes<T> <= channels) {
      for (; at + kLanes<T> <= piece.end; at += kLanes<T>) {
        Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes<T>; ++k) square[k] = load(w + (first + k) * step + at);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) store(row_at(at + i) + first, square[i]);
      }
    }
    for (; at < piece.end; ++at) {
      T* const row = row_at(at);
      for (int64_t k = first; k < first + kLanes<T>; ++k) row[k] = k < channels ? w[k * step + at] : T{0};
    }
  }
}

// The output channels of one row lie side by side.
template <typename T>
void conv_pack_copied(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, Range piece, int64_t first_row,
                      T* to) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  const Range channels = panel_channels(plan, index);
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    T* const end = std::copy_n(weight.w + weight.rows.offsets[row] + channels.begin, channels.size(),
                               to + (row - first_row) * kWidth);
    std::fill_n(end, kWidth - channels.size(), T{0});
  }
}

template <typename T>
void conv_pack_gathered(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, Range piece,
                        int64_t first_row, T* to) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  const Range channels = panel_channels(plan, index);
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const T* const w = weight.w + weight.rows.offsets[row] + channels.begin * weight.step;
    for (int64_t k = 0; k < kWidth; ++k)
      to[(row - first_row) * kWidth + k] = k < channels.size() ? w[k * weight.step] : T{0};
  }
}

template <typename T>
ConvPackPiece<T> conv_pack_piece(const LooseWeight<T>& weight) {
  if (weight.step == 1) return conv_pack_copied<T>;
  return weight.rows.rows.empty() ? conv_pack_gathered<T> : conv_pack_turned<T>;
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
