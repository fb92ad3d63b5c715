// The geometry of a weight gradient: which outputs a filter tap meets.
#pragma once

#include <numeric>

#include "cpu/geometry.h"

namespace fusedres::cpu {

// The inputs of an axis that some tap can meet, numbered densely: number i is input start + i*step. In these numbers
// the axis is a convolution again, and a pointwise one of any stride has stride 1.
struct TapAxis {
  int64_t start, step;
  ConvAxis axis;

  explicit TapAxis(const ConvAxis& conv) : axis(conv) {
    step = conv.kernel > 1 ? std::gcd(conv.stride, conv.dilation) : conv.stride;
    start = (step - conv.padding % step) % step;
    axis.in = std::max<int64_t>(ceil_div(conv.in - start, step), 0);
    axis.stride = conv.stride / step;
    axis.dilation = conv.dilation / step;
    axis.padding = (conv.padding + start) / step;
  }

  // The outputs within `outputs` for which tap `tap` lies inside the input.
  Range valid_outputs(int64_t tap, Range outputs) const {
    const int64_t offset = tap * axis.dilation - axis.padding;
    const int64_t begin = std::max(outputs.begin, ceil_div(-offset, axis.stride));
    return {begin, std::max(begin, std::min(outputs.end, ceil_div(axis.in - offset, axis.stride)))};
  }

  // The input numbers from the first to the last that `outputs` (not empty) meet with any tap.
  Range inputs(Range outputs) const {
    const int64_t first = outputs.begin * axis.stride - axis.padding;
    const int64_t last = (outputs.end - 1) * axis.stride + (axis.kernel - 1) * axis.dilation - axis.padding;
    return clip({first, last + 1}, axis.in);
  }
};

}  // namespace fusedres::cpu
