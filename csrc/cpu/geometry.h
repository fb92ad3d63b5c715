// Ranges, even cuts, and one spatial axis of a convolution.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedres::cpu {

// a / b rounded up, b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// Whether 0 <= index < size, in one comparison.
inline bool is_within(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

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
  Cut(int64_t extent, int64_t count)
      : count(count), size(count > 0 ? extent / count : 0), larger(count > 0 ? extent % count : 0) {}
  static Cut at_most(int64_t extent, int64_t most) { return {extent, std::max<int64_t>(ceil_div(extent, most), 1)}; }

  int64_t largest() const { return size + (larger > 0); }
  int64_t begin(int64_t i) const { return i * size + std::min(i, larger); }
  Range operator[](int64_t i) const { return {begin(i), begin(i + 1)}; }
};

// One spatial axis of a convolution. Output q and tap s meet at input q*stride + s*dilation - padding.
struct ConvAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

}  // namespace fusedres::cpu
