#include "cpu/winograd.h"

#include <cstdlib>

namespace fusedres::cpu {
namespace {

std::optional<WinogradAxis> winograd_axis(const GatherAxis& axis) {
  if (axis.taps.size() != 3 || axis.out_begin != 0 || axis.out_step != 1 || axis.in_step != 1) return {};
  const int64_t step = axis.offsets[1] - axis.offsets[0];
  const bool is_one_square = axis.points <= 2 * std::abs(step);
  if (step == 0 || axis.offsets[2] - axis.offsets[1] != step || is_one_square) return {};
  return WinogradAxis{axis.points, std::abs(step), std::min(axis.offsets[0], axis.offsets[2]), step < 0};
}

}  // namespace

std::optional<WinogradGrid> winograd_grid(const Gather& gather, int64_t depth, int64_t channels) {
  constexpr int64_t kFewChannels = 16;
  const std::optional<WinogradAxis> h = winograd_axis(gather.h), w = winograd_axis(gather.w);
  if (!h || !w || std::min(depth, channels) < kFewChannels) return {};
  constexpr double kGain = 1.4;
  const WinogradGrid grid{*h, *w};
  const double direct = 9.0 * h->points * w->points, products = 1.0 * kFrequencies * h->squares() * w->squares();
  return direct < kGain * products ? std::nullopt : std::optional(grid);
}

}  // namespace fusedres::cpu
