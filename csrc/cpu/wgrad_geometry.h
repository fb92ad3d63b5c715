// The geometry of a weight gradient: which outputs a filter tap meets, and how pixels and channels are cut up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace fusedres::cpu {

// a / b rounded up, b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// `range` inside [0, extent); empty ranges keep begin == end.
inline Range clip(Range range, int64_t extent) {
  const int64_t begin = std::clamp<int64_t>(range.begin, 0, extent);
  return {begin, std::clamp(range.end, begin, extent)};
}

// `extent` cut into `count` runs of at most `most`, as equal as can be: sizes differ by one at most, larger ones first.
struct Cut {
  int64_t count = 1, size = 0, larger = 0;  // `larger` runs are of size + 1

  Cut() = default;
  Cut(int64_t extent, int64_t count) : count(count), size(extent / count), larger(extent % count) {}
  static Cut at_most(int64_t extent, int64_t most) { return {extent, std::max<int64_t>(ceil_div(extent, most), 1)}; }

  int64_t largest() const { return size + (larger > 0); }
  int64_t begin(int64_t i) const { return i * size + std::min(i, larger); }
  Range operator[](int64_t i) const { return {begin(i), begin(i + 1)}; }
};

// One spatial axis of a convolution. Output q and tap s meet at input q*stride + s*dilation - padding.
struct ConvAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

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
