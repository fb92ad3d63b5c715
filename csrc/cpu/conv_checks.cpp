#include "cpu/conv_checks.h"

namespace fusedres::cpu {

void check_pair(const std::vector<int64_t>& pair, const char* name, int64_t least) {
  constexpr int64_t kMost = 1 << 30;  // products of two stay far from overflow
  require(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost, name,
          " is not a pair of integers from ", least, " to ", kMost);
}

ConvAxis check_axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  require(room >= 0, "an input of size ", in, " does not fit kernel_size ", kernel, ", padding ", padding,
          ", dilation ", dilation);
  return {in, room / stride + 1, kernel, stride, padding, dilation};
}

ConvAxes check_axes(const std::vector<int64_t>& input_size, const std::vector<int64_t>& kernel_size,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation) {
  check_pair(input_size, "input_size", 0);
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  return {check_axis(input_size[0], kernel_size[0], stride[0], padding[0], dilation[0]),
          check_axis(input_size[1], kernel_size[1], stride[1], padding[1], dilation[1])};
}

void check_weight(const Tensor& w) {
  const ScalarType dtype = w.defined() ? w.scalar_type() : ScalarType::Undefined;
  require(
      is_readable(w) && w.dim() == 4 && w.numel() > 0 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
      "w is ", describe(w), ", expected a (K, C, R, S) CPU tensor of float32 or float64");
}

Conv check_conv(const Tensor& w, const Activation& in, ScalarType dtype, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_weight(w);
  require(w.scalar_type() == dtype && w.size(1) == in.C, "w is ", describe(w), ", expected one dtype and number of ",
          "channels with an input of ", torch::headeronly::toString(dtype), " and ", in.C, " channels");
  const Conv conv{in.N, in.C, w.size(0), check_axes({in.H, in.W}, {w.size(2), w.size(3)}, stride, padding, dilation)};
  bytes_of({conv.N, conv.K, conv.axes.h.out, conv.axes.w.out}, sizeof(double));
  return conv;
}

void check_output(const Tensor& y, const char* name, const Tensor& x, const ConvAxes& axes) {
  check_activation(x, "x");
  check_activation(y, name);
  require(y.scalar_type() == x.scalar_type() && y.size(0) == x.size(0) && y.size(2) == axes.h.out &&
              y.size(3) == axes.w.out,
          name, " is ", describe(y), " and x is ", describe(x), ", expected one dtype and batch size, and ", name,
          " of height and width (", axes.h.out, ", ", axes.w.out, ")");
  require(y.size(1) > 0 && x.size(1) > 0, name, " is ", describe(y), " and x is ", describe(x), ", expected channels");
}

}  // namespace fusedres::cpu
