// The native op `input_moments`.
#include <algorithm>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/sums.h"
#include "cpu/wgrad.h"
#include "cpu/wgrad_checks.h"

namespace fusedres::cpu {
namespace {

// The pixels of x (N, H, W, channels) on the grid (N, P, Q) of every stride-th row and column. bn (4, channels) or
// null.
struct StridedInput {
  const void *x, *bn;
  int64_t channels, H, W, P, Q, row_stride, col_stride;

  // The pixel of x that is number `pixel` of the grid.
  int64_t source(int64_t pixel) const {
    const int64_t n = pixel / Q / P, p = pixel / Q % P, q = pixel % Q;
    return (n * H + p * row_stride) * W + q * col_stride;
  }
};

}  // namespace
}  // namespace fusedres::cpu

#define FUSEDRES_KERNELS "cpu/moments_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

// After a ReLU most centred values of a channel may be one and the same, and the errors of their sum all of one sign.
constexpr int64_t kLongestRun = 128;

template <typename T>
void write_mean(const StridedInput& input, int64_t pixels, acc_t<T>* mean) {
  using Acc = acc_t<T>;
  const auto kernel = input.bn ? FUSEDRES_BEST_ISA(input_sums<T, true>) : FUSEDRES_BEST_ISA(input_sums<T, false>);
  const Blocks blocks = reduction_blocks(pixels, input.channels, sizeof(T));
  const std::vector<double> sums = reduce<Acc>(
      blocks, 1, [&](const Block& block, double* state, Acc* scratch) { kernel(input, block, state, scratch); });
  for (int64_t c = 0; c < input.channels; ++c) mean[c] = sums[c] / std::max<int64_t>(pixels, 1);
}

}  // namespace

Tensor input_moments(const Tensor& x, const MaybeTensor& in_bn, const std::vector<int64_t>& stride) {
  const Activation sizes = check_activation(x, "x");
  check_pair(stride, "stride", 1);
  const ScalarType dtype = x.scalar_type();
  if (in_bn) check_channels(*in_bn, "in_bn", dtype, 4, sizes.C);
  const int64_t C = sizes.C;
  const int64_t P = (sizes.H + stride[0] - 1) / stride[0], Q = (sizes.W + stride[1] - 1) / stride[1];
  const Tensor moments = new_tensor({C + 1, C}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    Acc *product = mutable_data<Acc>(moments), *mean = product + C * C;
    write_mean<T>({const_data<void>(x), const_data<void>(in_bn), C, sizes.H, sizes.W, P, Q, stride[0], stride[1]},
                  sizes.N * P * Q, mean);
    WgradOperand<T> input = plain_operand<T>(x);
    input.bn = const_data<Acc>(in_bn);
    input.mean = mean;
    const ConvAxis h{sizes.H, P, 1, stride[0], 0, 1}, w{sizes.W, Q, 1, stride[1], 0, 1};
    contract_pixels<T, double>({sizes.N, C, C, h, w, true, kLongestRun}, input, input, product);
  });
  return moments;
}

}  // namespace fusedres::cpu
