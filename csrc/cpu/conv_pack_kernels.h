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
  const int64_t step = weight.order.step, channels = range.size();
  const T* const w = weight.w + range.begin * step;
  const auto row_at = [&](int64_t at) { return to + (weight.order.rows[at] - first_row) * kWidth; };
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
    T* const end = std::copy_n(weight.w + weight.order.offsets[row] + channels.begin, channels.size(),
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
    const T* const w = weight.w + weight.order.offsets[row] + channels.begin * weight.order.step;
    for (int64_t k = 0; k < kWidth; ++k)
      to[(row - first_row) * kWidth + k] = k < channels.size() ? w[k * weight.order.step] : T{0};
  }
}

template <typename T>
ConvPackPiece<T> conv_pack_piece(const LooseWeight<T>& weight) {
  if (weight.order.step == 1) return conv_pack_copied<T>;
  return weight.order.rows.empty() ? conv_pack_gathered<T> : conv_pack_turned<T>;
}

// Three taps g of one axis as the four factors G g of its inputs.
template <typename T>
FUSEDRES_INLINE void winograd_filter(Vec<T> first, Vec<T> middle, Vec<T> last, Vec<T> (&factors)[4]) {
  const T half{0.5};
  const Vec<T> ends = half * (first + last), centre = half * middle;
  factors[0] = first;
  factors[1] = ends + centre;
  factors[2] = ends - centre;
  factors[3] = last;
}

// The taps of some input channels and the output channels of panel `index`: to (channels, taps, width).
template <typename T>
void winograd_pack_taps(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, Range channels, T* to) {
  const int64_t depth = plan.sizes.depth, first_row = 9 * channels.begin;
  const auto pack = conv_pack_piece<T>(weight);
  const bool is_by_row = pack != conv_pack_turned<T> || weight.order.is_in_order;
  if (is_by_row) return pack(plan, weight, index, {first_row, 9 * channels.end}, first_row, to);
  if (!weight.order.is_tap_after_tap) {
    return conv_pack_gathered(plan, weight, index, {first_row, 9 * channels.end}, first_row, to);
  }
  for (int64_t tap = 0; tap < 9; ++tap) {
    pack(plan, weight, index, {tap * depth + channels.begin, tap * depth + channels.end}, first_row, to);
  }
}

// Panel `index` as G g G^T, to (kFrequencies, depth, width), frequencies plan.frequency_elements() apart.
template <typename T>
void winograd_pack(const ConvPlan& plan, const LooseWeight<T>& weight, int64_t index, T* to) {
  constexpr int64_t kWidth = kMicroVectors * kLanes<T>, kChannels = 16;
  const int64_t depth = plan.sizes.depth;
  const bool turns_h = plan.winograd->h.is_reversed, turns_w = plan.winograd->w.is_reversed;
  T taps[kChannels * 9 * kWidth];
  for (int64_t first = 0; first < depth; first += kChannels) {
    const Range channels{first, std::min(depth, first + kChannels)};
    winograd_pack_taps(plan, weight, index, channels, taps);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      for (int64_t k = 0; k < kWidth; k += kLanes<T>) {
        const T* const filter = taps + 9 * (c - first) * kWidth + k;
        Vec<T> rows[3][4], column[4];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const T* const row = filter + 3 * r * kWidth;
          const Vec<T> left = load(row), middle = load(row + kWidth), right = load(row + 2 * kWidth);
          winograd_filter<T>(turns_w ? right : left, middle, turns_w ? left : right, rows[r]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          winograd_filter<T>(turns_h ? rows[2][j] : rows[0][j], rows[1][j], turns_h ? rows[0][j] : rows[2][j], column);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) store(to + (4 * i + j) * plan.frequency_elements() + c * kWidth + k, column[i]);
        }
      }
    }
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
