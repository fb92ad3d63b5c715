// Weight gradients (fusedres/native.py).
#pragma once

#include "cpu/ops.h"

namespace fusedres::cpu {

Tensor conv_wgrad(const Tensor& g, const MaybeTensor& z, const MaybeTensor& bn, const MaybeTensor& sums,
                  double inv_count, const Tensor& x, const MaybeTensor& in_bn, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation);

Tensor centered_wgrad(const Tensor& g, const Tensor& x, const MaybeTensor& in_bn, const Tensor& mean,
                      const std::vector<int64_t>& stride);

Tensor input_moments(const Tensor& x, const MaybeTensor& in_bn, const std::vector<int64_t>& stride);

}  // namespace fusedres::cpu
