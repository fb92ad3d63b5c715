// Convolutions of float32 and float64, groups 1 (fusedres/native.py).
#pragma once

#include "cpu/ops.h"

namespace fusedres::cpu {

Tensor conv_pack(const Tensor& w);

Tensor conv_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& bias,
                  const MaybeTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool relu);

Tensor conv_dgrad(const Tensor& dz, const Tensor& w, const std::vector<int64_t>& input_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const MaybeTensor& residual,
                  const std::vector<int64_t>& residual_stride);

Tensor folded_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                    const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu);

}  // namespace fusedres::cpu
