// Max pooling of square windows.
#pragma once

#include "cpu/checks.h"

namespace fusedres::cpu {

struct PoolWindow {
  int64_t kernel, stride, padding;

  // Of an op's three integers, or none.
  static std::optional<PoolWindow> of(const std::vector<int64_t>& sizes);
  // The sizes of the output; throws where a map has none.
  Activation output(const Activation& in) const;
};

// x (in) and y dense channels_last, float or double. A window that holds NaN gives NaN.
template <typename T>
void maxpool(const T* x, const Activation& in, const PoolWindow& window, T* y);

}  // namespace fusedres::cpu
