// Convolutions of float32 and float64, groups 1 (fusedres/native.py).
#pragma once

#include "cpu/checks.h"
#include "cpu/conv_run.h"
#include "cpu/memory.h"
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

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias);

// Of a weight (K, C, R, S) that a conv of the input reads.
inline WeightStrides fprop_strides(const Tensor& w) {
  return {w.stride(0), w.stride(2), w.stride(3), w.stride(1), w.size(1)};
}

// A conv of inputs of one size, planned, whatever its tensors hold.
struct PlannedConv {
  // A weight that does not come packed is packed at every run.
  PlannedConv(const Conv& conv, ConvPlan plan, const WeightStrides& strides, bool is_packed);

  Conv conv;
  ConvPlan plan;
  WeightStrides strides;
  std::optional<WeightOrder> order;  // where it is packed at every run
};

// The plan of a conv on all threads.
template <typename T>
PlannedConv planned(const Conv& conv, const WeightStrides& strides, bool is_packed);

// What its tensors hold: act(scale*conv(x, w) + shift + residual).
template <typename T>
struct ConvValues {
  const T *w, *packed;     // packed: null where it is packed at every run
  const T *scale, *shift;  // (K,) or one and zero
};

// Of a weight that is checked.
template <typename T>
ConvValues<T> values_of(const PlannedConv& planned, const Tensor& w, const MaybeTensor& packed, const T* scale,
                        const T* shift);

// What convs that run one after another hand on.
template <typename T>
struct ConvBuffers {
  std::vector<ConvTable<T>> tables;  // one of each thread
  Buffer<T> panels, padded;
};

// The weight's panels, there already or made now, in `room`.
template <typename T>
const T* panels(const PlannedConv& planned, const ConvValues<T>& values, Buffer<T>& room);

// All but where the panels are.
template <typename T>
ConvOperands<T> operands_of(const PlannedConv& planned, const ConvValues<T>& values, const T* x, const T* residual,
                            bool relu, T* y) {
  ConvOperands<T> operands{x, nullptr, y, {values.w, planned.strides}};
  operands.scale = values.scale;
  operands.bias = values.shift;
  operands.residual = residual;
  operands.relu = relu;
  return operands;
}

// On all threads. x, residual and y are dense channels_last.
template <typename T>
void run(const PlannedConv& planned, const ConvValues<T>& values, const T* x, const T* residual, bool relu, T* y,
         ConvBuffers<T>& buffers);

}  // namespace fusedres::cpu
