// The native ops `conv_wgrad` and `centered_wgrad`.
#include "cpu/wgrad.h"

#include <algorithm>

#include "cpu/factors.h"
#include "cpu/wgrad_checks.h"

namespace fusedres::cpu {

void check_pair(const std::vector<int64_t>& pair, const char* name, int64_t least) {
  constexpr int64_t kMost = 1 << 30;  // products of two stay far from overflow
  require(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost, name,
          " is not a pair of integers from ", least, " to ", kMost);
}

namespace {

// One spatial axis of the convolution of `x` whose output is `g`.
ConvAxis check_axis(const Tensor& g, const Tensor& x, int64_t axis, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  const ConvAxis conv{x.size(axis), g.size(axis), kernel, stride, padding, dilation};
  const int64_t room = conv.in + 2 * padding - dilation * (kernel - 1) - 1;
  require(room >= 0 && conv.out == room / stride + 1, "g is ", describe(g), " and x is ", describe(x), ": axis ", axis,
          " does not fit kernel_size ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ", dilation);
  return conv;
}

void check_same(const Tensor& g, const Tensor& x) {
  check_activation(g, "g");
  check_activation(x, "x");
  require(g.scalar_type() == x.scalar_type() && g.size(0) == x.size(0), "g is ", describe(g), " and x is ", describe(x),
          ", expected one dtype and batch size");
  require(g.size(1) > 0 && x.size(1) > 0, "g is ", describe(g), " and x is ", describe(x), ", expected channels");
}

}  // namespace

Tensor conv_wgrad(const Tensor& g, const MaybeTensor& z, const MaybeTensor& bn, const MaybeTensor& sums,
                  double inv_count, const Tensor& x, const MaybeTensor& in_bn, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  check_same(g, x);
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  const ConvAxis h = check_axis(g, x, 2, kernel_size[0], stride[0], padding[0], dilation[0]);
  const ConvAxis w = check_axis(g, x, 3, kernel_size[1], stride[1], padding[1], dilation[1]);
  const int64_t N = g.size(0), K = g.size(1), C = x.size(1);
  const ScalarType dtype = x.scalar_type();
  require(z.has_value() == bn.has_value() && z.has_value() == sums.has_value(), "z, bn and sums go together");
  if (z) {
    check_like(*z, "z", g, "g");
    check_channels(*bn, "bn", dtype, 4, K);
    check_channels(*sums, "sums", dtype, 2, K);
  }
  if (in_bn) check_channels(*in_bn, "in_bn", dtype, 4, C);
  const Tensor dw = new_activation({K, C, kernel_size[0], kernel_size[1]}, dtype);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    std::vector<Acc> factors;
    if (z) factors = dbn_factors(const_data<Acc>(bn), const_data<Acc>(sums), K, inv_count);
    WgradOperand<T> gradient = plain_operand<T>(g), input = plain_operand<T>(x);
    gradient.z = const_data<T>(z);
    gradient.factors = z ? factors.data() : nullptr;
    input.bn = const_data<Acc>(in_bn);
    contract_pixels<T, Acc>({N, K, C, h, w}, gradient, input, mutable_data<T>(dw));
  });
  return dw;
}

Tensor centered_wgrad(const Tensor& g, const Tensor& x, const MaybeTensor& in_bn, const Tensor& mean,
                      const std::vector<int64_t>& stride) {
  check_same(g, x);
  check_pair(stride, "stride", 1);
  const ConvAxis h = check_axis(g, x, 2, 1, stride[0], 0, 1);
  const ConvAxis w = check_axis(g, x, 3, 1, stride[1], 0, 1);
  const int64_t N = g.size(0), K = g.size(1), C = x.size(1);
  const ScalarType dtype = x.scalar_type();
  if (in_bn) check_channels(*in_bn, "in_bn", dtype, 4, C);
  check_tensor(mean, "mean", acc_dtype(dtype), {C});
  const Tensor product = new_tensor({K, C}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    WgradOperand<T> input = plain_operand<T>(x);
    input.bn = const_data<Acc>(in_bn);
    input.mean = const_data<Acc>(mean);
    contract_pixels<T, double>({N, K, C, h, w}, plain_operand<T>(g), input, mutable_data<Acc>(product));
  });
  return product;
}

}  // namespace fusedres::cpu
