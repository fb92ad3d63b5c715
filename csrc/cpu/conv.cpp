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

template <typename T>
PlannedConv<T>::PlannedConv(const Conv& conv, ConvPlan plan, const Tensor& w, const MaybeTensor& packed, const T* scale,
                            const T* shift)
    : conv(conv),
      plan(std::move(plan)),
      weight(fprop_view<T>(w)),
      packed(const_data<T>(packed)),
      scale(scale),
      shift(shift) {
  if (packed) check_tensor(*packed, "packed", w.scalar_type(), {this->plan.packed_elements()});
}

template <typename T>
ConvPlan shared_plan(const Conv& conv, const MaybeTensor& packed) {
  return fprop_plan<T>(conv, torch::stable::get_num_threads(), packed ? Weights::kPacked : Weights::kLoose);
}

template <typename T>
const T* panels(const PlannedConv<T>& planned, Buffer<T>& room) {
  if (planned.packed != nullptr) return planned.packed;
  T* const made = room.of({planned.plan.packed_elements()});
  pack_weight(planned.plan, {planned.plan, planned.weight}, made);
  return made;
}

template <typename T>
void run(const PlannedConv<T>& planned, const T* x, const T* residual, bool relu, T* y, ConvBuffers<T>& buffers) {
  const T* const input = merges_columns(planned.conv) ? pad_columns(x, planned.conv, buffers.padded) : x;
  ConvOperands<T> operands{input, nullptr, y, planned.weight};
  std::optional<LooseWeight<T>> loose;
  if (planned.plan.packs_panels) {
    operands.loose = &loose.emplace(planned.plan, planned.weight);
  } else {
    operands.packed = panels(planned, buffers.panels);
  }
  operands.scale = planned.scale;
  operands.bias = planned.shift;
  operands.residual = residual;
  operands.relu = relu;
  run(planned.plan, operands, buffers.tables);
}

#define FUSEDRES_CONV(T)                                             \
  template struct PlannedConv<T>;                                    \
  template ConvPlan shared_plan<T>(const Conv&, const MaybeTensor&); \
  template const T* panels<T>(const PlannedConv<T>&, Buffer<T>&);    \
  template void run<T>(const PlannedConv<T>&, const T*, const T*, bool, T*, ConvBuffers<T>&);
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
    pack_weight(plan, {plan, fprop_view<T>(w)}, mutable_data<T>(*packed));
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
    const PlannedConv<T> planned(conv, shared_plan<T>(conv, packed), w, packed, nullptr, const_data<T>(bias));
    ConvBuffers<T> buffers;
    run(planned, const_data<T>(x), const_data<T>(residual), relu, mutable_data<T>(y), buffers);
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
      pack_weight(plan, {plan, view}, packed);
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
