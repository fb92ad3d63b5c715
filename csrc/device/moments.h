// (count, mean, M2) of values, one at a time and merged pairwise: never a sum of squares less a squared sum.
#pragma once

#include "device/warp.h"

namespace fusedres::device {

struct Moments {
  float count, mean, m2;

  FUSEDRES_HOST_DEVICE static Moments none() { return {0.0f, 0.0f, 0.0f}; }

  // Welford 1962.
  FUSEDRES_HOST_DEVICE void add(float x) {
    count += 1.0f;
    const float delta = x - mean;
    mean += delta / count;
    m2 += delta * (x - mean);
  }
};

// Chan, Golub and LeVeque 1979. Either side may be empty.
FUSEDRES_HOST_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return Moments::none();
  const float share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Merged over the lanes by a fixed tree; lane 0 has the result.
FUSEDRES_DEVICE Moments warp_merge(Moments value) {
  FUSEDRES_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Moments other{shuffle_down(value.count, lanes), shuffle_down(value.mean, lanes),
                        shuffle_down(value.m2, lanes)};
    if (lane_index() + lanes < kWarp) value = merge(value, other);
  }
  return value;
}

}  // namespace fusedres::device
