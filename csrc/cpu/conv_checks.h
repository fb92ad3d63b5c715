// What every op around a convolution checks alike.
#pragma once

#include <vector>

#include "cpu/checks.h"
#include "cpu/geometry.h"

namespace fusedres::cpu {

// Two integers of at least `least`, and small enough that sums of their products are far from overflow.
void check_pair(const std::vector<int64_t>& pair, const char* name, int64_t least);

// One spatial axis of a convolution of an input of size `in`.
ConvAxis check_axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);

// Both axes of the convolution of an (H, W) input.
struct ConvAxes {
  ConvAxis h, w;
};
ConvAxes check_axes(const std::vector<int64_t>& input_size, const std::vector<int64_t>& kernel_size,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation);

// A convolution without groups.
struct Conv {
  int64_t N, C, K;
  ConvAxes axes;

  Activation output() const { return {N, K, axes.h.out, axes.w.out}; }
};

// A weight (K, C, R, S) of float32 or float64, of any strides.
void check_weight(const Tensor& w);

// The convolution of an input of these sizes and dtype with `w`.
Conv check_conv(const Tensor& w, const Activation& in, ScalarType dtype, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// Calls function(T{}) for the element type of a checked weight.
template <typename Function>
void for_conv_dtype(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Double) return function(double{});
  function(float{});
}

// `y` must be an output of that convolution: (N, K, P, Q) of the batch size and dtype of `x`.
void check_output(const Tensor& y, const char* name, const Tensor& x, const ConvAxes& axes);

}  // namespace fusedres::cpu
