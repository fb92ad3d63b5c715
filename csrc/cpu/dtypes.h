// The element types of activations, torch-free, and the type each is computed in.
#pragma once

#include <cstdint>

namespace fusedres::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};

template <>
struct AccOf<double> {
  using type = double;
};

// The accumulation type: double for double, float for all others.
template <typename T>
using acc_t = typename AccOf<T>::type;

}  // namespace fusedres::cpu
