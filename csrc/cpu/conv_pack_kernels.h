// Packing of weights into panels, in the three ways in which they lie in memory. Included by foreach_isa.h, per
// instruction set.

#include "cpu/micro_tile.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Rows [piece) of one panel of `channels` output channels, `step` elements apart from w on; panel (rows, width).
template <typename T>
using ConvPackPiece = void (*)(const PanelRows& rows, const T* w, int64_t step, int64_t channels, Range piece,
                               T* panel);

// The weights of one output channel lie side by side, in any order: squares of as many channels are turned.
template <typename T>
void conv_pack_turned(const PanelRows& rows, const T* w, int64_t step, int64_t channels, Range piece, T* panel) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  for (int64_t first = 0; first < kWidth; first += kLanes<T>) {
    int64_t at = piece.begin;
    if (first + kLanes<T> <= channels) {
      for (; at + kLanes<T> <= piece.end; at += kLanes<T>) {
        Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes<T>; ++k) square[k] = load(w + (first + k) * step + at);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) store(panel + rows.rows[at + i] * kWidth + first, square[i]);
      }
    }
    for (; at < piece.end; ++at) {
      T* const row = panel + rows.rows[at] * kWidth;
      for (int64_t k = first; k < first + kLanes<T>; ++k) row[k] = k < channels ? w[k * step + at] : T{0};
    }
  }
}

// The output channels of one row lie side by side.
template <typename T>
void conv_pack_copied(const PanelRows& rows, const T* w, int64_t, int64_t channels, Range piece, T* panel) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    T* const to = panel + row * kWidth;
    std::fill_n(std::copy_n(w + rows.offsets[row], channels, to), kWidth - channels, T{0});
  }
}

template <typename T>
void conv_pack_gathered(const PanelRows& rows, const T* w, int64_t step, int64_t channels, Range piece, T* panel) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>;
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    for (int64_t k = 0; k < kWidth; ++k)
      panel[row * kWidth + k] = k < channels ? w[rows.offsets[row] + k * step] : T{0};
  }
}

template <typename T>
ConvPackPiece<T> conv_pack_piece(const PanelRows& rows, int64_t step) {
  return step == 1 ? conv_pack_copied<T> : rows.rows.empty() ? conv_pack_gathered<T> : conv_pack_turned<T>;
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
