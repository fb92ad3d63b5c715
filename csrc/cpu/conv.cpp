// The native ops `conv_fprop`, `conv_dgrad` and `conv_pack`.
#include "cpu/conv.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/conv_pack.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fusedres::cpu {
namespace {

// `x` with the padding of its rows written out.
template <typename T>
const T* pad_columns(const T* x, const Conv& conv, Buffer<T>& padded) {
  const ConvAxis& w = conv.axes.w;
  const int64_t rows = conv.N * conv.axes.h.in, length = w.in * conv.C, margin = w.padding * conv.C;
  T* const to = padded.of({rows, length + 2 * margin});
  parallel_for_each(rows, [&](int64_t row) {
    T* at = std::fill_n(to + row * (length + 2 * margin), margin, T{0});
    at = std::copy_n(x + row * length, length, at);
    std::fill_n(at, margin, T{0});
  });
  return to;
}

}  // namespace

PlannedConv::PlannedConv(const Conv& conv, ConvPlan plan, const WeightStrides& strides, bool is_packed)
    : conv(conv), plan(std::move(plan)), strides(strides) {
  if (!is_packed) order.emplace(this->plan, strides);
}

template <typename T>
PlannedConv planned(const Conv& conv, const WeightStrides& strides, bool is_packed) {
  const Weights weights = is_packed ? Weights::kPacked : Weights::kLoose;
  return {conv, fprop_plan<T>(conv, torch::stable::get_num_threads(), weights), strides, is_packed};
}

template <typename T>
ConvValues<T> values_of(const PlannedConv& planned, const Tensor& w, const MaybeTensor& packed, const T* scale,
                        const T* shift) {
  if (packed) check_tensor(*packed, "packed", w.scalar_type(), {planned.plan.packed_elements()});
  return {const_data<T>(w), const_data<T>(packed), scale, shift};
}

template <typename T>
const T* panels(const PlannedConv& planned, const ConvValues<T>& values, Buffer<T>& room) {
  if (values.packed != nullptr) return values.packed;
  T* const made = room.of({planned.plan.packed_elements()});
  pack_weight<T>(planned.plan, {values.w, *planned.order}, made);
  return made;
}

template <typename T>
void run(const PlannedConv& planned, const ConvValues<T>& values, const T* x, const T* residual, bool relu, T* y,
         ConvBuffers<T>& buffers) {
  const T* const input = merges_columns(planned.conv) ? pad_columns(x, planned.conv, buffers.padded) : x;
  ConvOperands<T> operands = operands_of(planned, values, input, residual, relu, y);
  std::optional<LooseWeight<T>> loose;
  if (planned.plan.packs_panels) {
    operands.loose = &loose.emplace(LooseWeight<T>{values.w, *planned.order});
  } else {
    operands.packed = panels(planned, values, buffers.panels);
  }
  run(planned.plan, operands, buffers.tables);
}

#define FUSEDRES_CONV(T)                                                                                          \
  template PlannedConv planned<T>(const Conv&, const WeightStrides&, bool);                                       \
  template ConvValues<T> values_of<T>(const PlannedConv&, const Tensor&, const MaybeTensor&, const T*, const T*); \
  template const T* panels<T>(const PlannedConv&, const ConvValues<T>&, Buffer<T>&);                              \
  template void run<T>(const PlannedConv&, const ConvValues<T>&, const T*, const T*, bool, T*, ConvBuffers<T>&);
FUSEDRES_CONV(float)
FUSEDRES_CONV(double)

Tensor conv_pack(const Tensor& w, const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_weight(w);
  check_pair(input_size, "input_size", 0);
  const Activation in{1, w.size(1), input_size[0], input_size[1]};
  const Conv conv = check_conv(w, in, w.scalar_type(), stride, padding, dilation);
  MaybeTensor packed;
  for_conv_dtype(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const ConvPlan plan = fprop_plan<T>(conv, 1, Weights::kPacked);
    packed = new_tensor({plan.packed_elements()}, w.scalar_type());
    pack_weight<T>(plan, {const_data<T>(w), WeightOrder(plan, fprop_strides(w))}, mutable_data<T>(*packed));
  });
  return *packed;
}

Tensor conv_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& packed, const MaybeTensor& bias,
                  const MaybeTensor& residual, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool relu) {
  const ScalarType dtype = x.scalar_type();
  const Conv conv = check_conv(w, check_activation(x, "x"), dtype, stride, padding, dilation);
  if (bias) check_tensor(*bias, "bias", dtype, {conv.K});
  const Tensor y = new_activation(conv.output(), dtype);
  if (residual) check_like(*residual, "residual", y, "the output");
  for_conv_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const PlannedConv conv_on_all = planned<T>(conv, fprop_strides(w), packed.has_value());
    const ConvValues<T> values = values_of<T>(conv_on_all, w, packed, nullptr, const_data<T>(bias));
    ConvBuffers<T> buffers;
    run(conv_on_all, values, const_data<T>(x), const_data<T>(residual), relu, mutable_data<T>(y), buffers);
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
    Buffer<T> panels;
    std::vector<ConvTable<T>> tables;
    for (const Gather& gather : dgrad_gathers(axes.h, axes.w)) {
      const ConvPlan plan = gather_plan<T>({out.N, C, out.H, out.W, out.C, out.C, axes.h.in, axes.w.in}, gather,
                                           torch::stable::get_num_threads(), Weights::kPacked);
      const WeightView<T> view{const_data<T>(w), {w.stride(1), w.stride(2), w.stride(3), w.stride(0), w.size(0)}};
      T* const packed = panels.of({plan.packed_elements()});
      pack_weight<T>(plan, {view.w, WeightOrder(plan, view.strides)}, packed);
      ConvOperands<T> operands{const_data<T>(dz), packed, mutable_data<T>(dx), view};
      operands.residual = const_data<T>(residual);
      operands.residual_h = residual ? residual_stride[0] : 1;
      operands.residual_w = residual ? residual_stride[1] : 1;
      run(plan, operands, tables);
    }
  });
  return dx;
}

}  // namespace fusedres::cpu
