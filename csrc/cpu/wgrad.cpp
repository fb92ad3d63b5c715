// The native ops `conv_wgrad` and `centered_wgrad`.
#include "cpu/wgrad.h"

#include <algorithm>

#include "cpu/factors.h"
#include "cpu/memory.h"
#include "cpu/wgrad_checks.h"

namespace fusedres::cpu {

Tensor conv_wgrad(const Tensor& g, const MaybeTensor& z, const MaybeTensor& bn, const MaybeTensor& sums,
                  double inv_count, const Tensor& x, const MaybeTensor& in_bn, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  check_activation(x, "x");
  const ConvAxes axes = check_axes({x.size(2), x.size(3)}, kernel_size, stride, padding, dilation);
  check_output(g, "g", x, axes);
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
    contract_pixels<T, Acc>({N, K, C, axes.h, axes.w}, gradient, input, mutable_data<T>(dw));
  });
  return dw;
}

Tensor centered_wgrad(const Tensor& g, const Tensor& x, const MaybeTensor& in_bn, const Tensor& mean,
                      const std::vector<int64_t>& stride) {
  check_activation(x, "x");
  const ConvAxes axes = check_axes({x.size(2), x.size(3)}, {1, 1}, stride, {0, 0}, {1, 1});
  check_output(g, "g", x, axes);
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
    contract_pixels<T, double>({N, K, C, axes.h, axes.w}, plain_operand<T>(g), input, mutable_data<Acc>(product));
  });
  return product;
}

}  // namespace fusedres::cpu
