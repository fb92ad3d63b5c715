// Convolutions of float32 and float64, groups 1 (fusedres/native.py).
#pragma once

#include "cpu/checks.h"
#include "cpu/conv_pack.h"
#include "cpu/ops.h"

namespace fusedres::cpu {

Tensor conv_pack(const Tensor& w, const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

Tensor conv_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& bias,
                  const MaybeTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool relu);

Tensor conv_dgrad(const Tensor& dz, const Tensor& w, const std::vector<int64_t>& input_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const MaybeTensor& residual,
                  const std::vector<int64_t>& residual_stride);

Tensor eval_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, const std::vector<Tensor>& vectors, const Tensor& eps,
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu);

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias);

// A weight and, where it is packed already, its panels; else these go to `scratch`, where that is large enough, or to
// memory of their own.
struct EvalWeight {
  const Tensor& w;
  MaybeTensor packed, scratch;
};

template <typename T>
WeightView<T> fprop_view(const Tensor& w) {
  return {const_data<T>(w), {w.stride(0), w.stride(2), w.stride(3), w.stride(1), w.size(1)}};
}

template <typename T>
Tensor panels(const ConvPlan& plan, const EvalWeight& weight);

// act(scale*conv(x, w) + shift + residual), affine (2, K): scale and shift.
Tensor conv_affine(const Tensor& x, const EvalWeight& weight, const Tensor& affine, const MaybeTensor& residual,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, bool relu);

}  // namespace fusedres::cpu
