// Convolutions of float32 and float64, groups 1 (fusedres/native.py).
#pragma once

#include "cpu/checks.h"
#include "cpu/conv_run.h"
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
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu,
                  const std::vector<int64_t>& pool);

Tensor eval_program(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                    const std::vector<Tensor>& vectors, const Tensor& eps, const std::vector<int64_t>& geometry,
                    const std::vector<int64_t>& forms, const std::vector<int64_t>& input_size);

Tensor eval_network(const Tensor& x, const Tensor& program);

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias);

// A conv of inputs of one size, planned: act(scale*conv(x, w) + shift + residual).
template <typename T>
struct PlannedConv {
  Conv conv;
  ConvPlan plan;
  Tensor w;
  MaybeTensor packed;    // its panels; without, every run makes them
  const T *scale, *shift;  // (K,) or one and zero
};

// On all threads.
template <typename T>
PlannedConv<T> planned(const Conv& conv, const Tensor& w, const MaybeTensor& packed, const T* scale, const T* shift);

// What convs that run one after another hand on: memory that so stays in the caches.
template <typename T>
struct ConvBuffers {
  std::vector<ConvTable<T>> tables;  // one of each thread
  MaybeTensor panels;                // of the weight in use
};

template <typename T>
Tensor run(const PlannedConv<T>& planned, const Tensor& x, const MaybeTensor& residual, bool relu,
           ConvBuffers<T>& buffers);

template <typename T>
WeightView<T> fprop_view(const Tensor& w) {
  return {const_data<T>(w), {w.stride(0), w.stride(2), w.stride(3), w.stride(1), w.size(1)}};
}

// The panels of `w`: `packed`, or made now, in `room` where they find it there.
template <typename T>
Tensor panels(const ConvPlan& plan, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& room);

}  // namespace fusedres::cpu
