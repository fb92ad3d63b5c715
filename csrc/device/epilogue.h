// Work on an accumulator before it is stored: bias, residual, ReLU. All in float32; the caller rounds once.
#pragma once

#include "device/scalar.h"

namespace fusedres::device {

// max(x, 0) that keeps NaN, which fmaxf does not.
FUSEDRES_HOST_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

// The larger; NaN if either is.
FUSEDRES_HOST_DEVICE float max_keeping_nan(float a, float b) { return a > b || a != a ? a : b; }

// act(accumulator + bias + residual).
struct BiasResidualRelu {
  const float* bias;  // (channels,)
  int channels;       // beyond them the bias is 0
  bool relu;

  FUSEDRES_DEVICE float operator()(float accumulator, int channel, float residual) const {
    const float z = accumulator + (channel < channels ? bias[channel] : 0.0f) + residual;
    return relu ? device::relu(z) : z;
  }
};

}  // namespace fusedres::device
