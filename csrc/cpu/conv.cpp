// The native ops `conv_fprop`, `conv_dgrad` and `conv_pack`.
#include "cpu/conv.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/conv_pack.h"
#include "cpu/conv_run.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fusedres::cpu {
namespace {

// `x` with the padding of its rows written out.
template <typename T>
Tensor pad_columns(const T* x, const Conv& conv, ScalarType dtype) {
  const ConvAxis& w = conv.axes.w;
  const int64_t rows = conv.N * conv.axes.h.in, length = w.in * conv.C, margin = w.padding * conv.C;
  const Tensor padded = new_tensor({rows, length + 2 * margin}, dtype);
  T* const to = mutable_data<T>(padded);
  parallel_for_each(rows, [&](int64_t row) {
    T* at = std::fill_n(to + row * (length + 2 * margin), margin, T{0});
    at = std::copy_n(x + row * length, length, at);
    std::fill_n(at, margin, T{0});
  });
  return padded;
}

template <typename T>
Tensor packed_weight(const ConvPlan& plan, const LooseWeight<T>& weight, ScalarType dtype) {
  const Tensor packed = new_tensor({plan.packed_elements()}, dtype);
  pack_weight(plan, weight, mutable_data<T>(packed));
  return packed;
}

Tensor checked_packed(const ConvPlan& plan, const Tensor& packed, ScalarType dtype) {
  check_tensor(packed, "packed", dtype, {plan.packed_elements()});
  return packed;
}

}  // namespace

template <typename T>
Tensor panels(const ConvPlan& plan, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& room) {
  if (packed) return checked_packed(plan, *packed, w.scalar_type());
  const LooseWeight<T> loose(plan, fprop_view<T>(w));
  if (!room || room->numel() < plan.packed_elements()) return packed_weight(plan, loose, w.scalar_type());
  pack_weight(plan, loose, mutable_data<T>(*room));
  return *room;
}

template <typename T>
PlannedConv<T> planned(const Conv& conv, const Tensor& w, const MaybeTensor& packed, const T* scale, const T* shift) {
  const Weights weights = packed ? Weights::kPacked : Weights::kLoose;
  return {conv, fprop_plan<T>(conv, torch::stable::get_num_threads(), weights), w, packed, scale, shift};
}

template <typename T>
Tensor run(const PlannedConv<T>& planned, const Tensor& x, const MaybeTensor& residual, bool relu,
           ConvBuffers<T>& buffers) {
  const auto& [conv, plan, w, packed, scale, shift] = planned;
  const ScalarType dtype = x.scalar_type();
  const Tensor y = new_activation(conv.output(), dtype);
  if (residual) check_like(*residual, "residual", y, "the output");
  const Tensor input = merges_columns(conv) ? pad_columns(const_data<T>(x), conv, dtype) : x;
  ConvOperands<T> operands{const_data<T>(input), nullptr, mutable_data<T>(y), fprop_view<T>(w)};
  MaybeTensor weight;
  std::optional<LooseWeight<T>> loose;
  if (plan.packs_panels) {
    loose.emplace(plan, operands.weight);
    operands.loose = &*loose;
  } else {
    weight = panels<T>(plan, w, packed, buffers.panels);
    operands.packed = const_data<T>(weight);
    if (!packed) buffers.panels = weight;
  }
  operands.scale = scale;
  operands.bias = shift;
  operands.residual = const_data<T>(residual);
  operands.relu = relu;
  run(plan, operands, buffers.tables);
  return y;
}

#define FUSEDRES_CONV(T)                                                                                          \
  template Tensor panels<T>(const ConvPlan&, const Tensor&, const MaybeTensor&, const MaybeTensor&);              \
  template PlannedConv<T> planned<T>(const Conv&, const Tensor&, const MaybeTensor&, const T*, const T*);         \
  template Tensor run<T>(const PlannedConv<T>&, const Tensor&, const MaybeTensor&, bool, ConvBuffers<T>&);
FUSEDRES_CONV(float)
FUSEDRES_CONV(double)

Tensor conv_pack(const Tensor& w, const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_weight(w);
  check_pair(input_size, "input_size", 0);
  const Activation in{1, w.size(1), input_size[0], input_size[1]};
  const Conv conv = check_conv(w, in, w.scalar_type(), stride, padding, dilation);
  Tensor packed = w;
  for_conv_dtype(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    packed = panels<T>(fprop_plan<T>(conv, 1, Weights::kPacked), w, {}, {});
  });
  return packed;
}

Tensor conv_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& bias,
                  const MaybeTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool relu) {
  const ScalarType dtype = x.scalar_type();
  const Conv conv = check_conv(w, check_activation(x, "x"), dtype, stride, padding, dilation);
  if (bias) check_tensor(*bias, "bias", dtype, {conv.K});
  Tensor y = x;
  for_conv_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    ConvBuffers<T> buffers;
    y = run(planned<T>(conv, w, packed, nullptr, const_data<T>(bias)), x, residual, relu, buffers);
  });
  return y;
}

Tensor conv_dgrad(const Tensor& dz, const Tensor& w, const std::vector<int64_t>& input_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const MaybeTensor& residual,
                  const std::vector<int64_t>& residual_stride) {
  check_weight(w);
  const Activation out = check_activation(dz, "dz");
  const ScalarType dtype = dz.scalar_type();
  const ConvAxes axes = check_axes(input_size, {w.size(2), w.size(3)}, stride, padding, dilation);
  require(w.scalar_type() == dtype && w.size(0) == out.C && axes.h.out == out.H && axes.w.out == out.W, "dz is ",
          describe(dz), " and w is ", describe(w), ", expected one dtype, number of channels, and height and width (",
          axes.h.out, ", ", axes.w.out, ")");
  const int64_t C = w.size(1);
  const Tensor dx = new_activation({out.N, C, axes.h.in, axes.w.in}, dtype);
  if (residual) {
    check_pair(residual_stride, "residual_stride", 1);
    check_channels_last(*residual, "residual", dtype,
                        {out.N, C, ceil_div(axes.h.in, residual_stride[0]), ceil_div(axes.w.in, residual_stride[1])});
  }
  if (dx.numel() == 0) return dx;
  for_conv_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<ConvTable<T>> tables;
    for (const Gather& gather : dgrad_gathers(axes.h, axes.w)) {
      const ConvPlan plan = gather_plan<T>({out.N, C, out.H, out.W, out.C, out.C, axes.h.in, axes.w.in}, gather,
                                           torch::stable::get_num_threads(), Weights::kPacked);
      const WeightView<T> view{const_data<T>(w), {w.stride(1), w.stride(2), w.stride(3), w.stride(0), w.size(0)}};
      const Tensor weight = packed_weight<T>(plan, {plan, view}, dtype);
      ConvOperands<T> operands{const_data<T>(dz), const_data<T>(weight), mutable_data<T>(dx), view};
      operands.residual = const_data<T>(residual);
      operands.residual_h = residual ? residual_stride[0] : 1;
      operands.residual_w = residual ? residual_stride[1] : 1;
      run(plan, operands, tables);
    }
  });
  return dx;
}

}  // namespace fusedres::cpu
