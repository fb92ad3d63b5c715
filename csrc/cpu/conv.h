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

Tensor eval_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, const std::vector<Tensor>& vectors, const Tensor& eps,
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu,
                  const std::vector<int64_t>& pool);

Tensor eval_program(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                    const std::vector<Tensor>& vectors, const Tensor& eps, const std::vector<int64_t>& geometry,
                    const std::vector<int64_t>& forms, const std::vector<int64_t>& input_size);

Tensor eval_network(const Tensor& x, const Tensor& program);

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias);

template <typename T>
WeightView<T> fprop_view(const Tensor& w) {
  return {const_data<T>(w), {w.stride(0), w.stride(2), w.stride(3), w.stride(1), w.size(1)}};
}

// A conv of inputs of one size, planned: act(scale*conv(x, w) + shift + residual). Its tensors must live as long.
template <typename T>
struct PlannedConv {
  PlannedConv(const Conv& conv, ConvPlan plan, const Tensor& w, const MaybeTensor& packed, const T* scale,
              const T* shift);

  Conv conv;
  ConvPlan plan;
  WeightView<T> weight;
  const T* packed;         // its panels; null where every run makes them
  const T *scale, *shift;  // (K,) or one and zero
};

// The plan of a conv on all threads.
template <typename T>
ConvPlan shared_plan(const Conv& conv, const MaybeTensor& packed);

// What convs that run one after another hand on.
template <typename T>
struct ConvBuffers {
  std::vector<ConvTable<T>> tables;  // one of each thread
  Buffer<T> panels, padded;
};

// The weight's panels, there already or made now, in `room`.
template <typename T>
const T* panels(const PlannedConv<T>& planned, Buffer<T>& room);

// On all threads. x, residual and y are dense channels_last.
template <typename T>
void run(const PlannedConv<T>& planned, const T* x, const T* residual, bool relu, T* y, ConvBuffers<T>& buffers);

}  // namespace fusedres::cpu
