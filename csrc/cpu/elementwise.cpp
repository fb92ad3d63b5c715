// The native ops `scale_shift_add_relu` and `dbn`: tails without a reduction.
#include "cpu/checks.h"
#include "cpu/factors.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace fusedres::cpu {
namespace {

enum class Residual { none, plain, bn };

// The operands of scale_shift_add_relu; activations are of type T, bn and residual_bn of acc_t<T>.
struct ForwardTail {
  const void *z, *residual, *bn, *residual_bn;
  void* y;
  int64_t channels;
};

}  // namespace
}  // namespace fusedres::cpu

#define FUSEDRES_KERNELS "cpu/elementwise_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

using ForwardKernel = void (*)(const ForwardTail&, const Block&);

template <typename T, Residual kResidual>
ForwardKernel forward_kernel(bool relu) {
  return relu ? FUSEDRES_BEST_ISA(scale_shift_add_relu<T, kResidual, true>)
              : FUSEDRES_BEST_ISA(scale_shift_add_relu<T, kResidual, false>);
}

template <typename T>
ForwardKernel forward_kernel(bool residual, bool residual_bn, bool relu) {
  if (residual_bn) return forward_kernel<T, Residual::bn>(relu);
  return residual ? forward_kernel<T, Residual::plain>(relu) : forward_kernel<T, Residual::none>(relu);
}

}  // namespace

Tensor scale_shift_add_relu(const Tensor& z, const Tensor& bn, const MaybeTensor& residual,
                            const MaybeTensor& residual_bn, bool relu) {
  const Activation sizes = check_activation(z, "z");
  const ScalarType dtype = z.scalar_type();
  check_channels(bn, "bn", dtype, 4, sizes.C);
  if (residual) check_like(*residual, "residual", z, "z");
  require(residual || !residual_bn, "residual_bn was given without a residual");
  if (residual_bn) check_channels(*residual_bn, "residual_bn", dtype, 4, sizes.C);
  const Tensor y = new_activation(sizes, dtype);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const ForwardTail tail{const_data<void>(z),           const_data<void>(residual), const_data<void>(bn),
                           const_data<void>(residual_bn), y.mutable_data_ptr(),       sizes.C};
    const ForwardKernel kernel = forward_kernel<T>(residual.has_value(), residual_bn.has_value(), relu);
    const Blocks blocks = row_blocks(sizes.rows(), sizes.C, sizeof(T));
    parallel_for_each(blocks.count(), [&](int64_t i) { kernel(tail, blocks[i]); });
  });
  return y;
}

Tensor dbn(const Tensor& g, const Tensor& z, const Tensor& bn, const Tensor& sums, double inv_count) {
  const Activation sizes = check_activation(g, "g");
  const ScalarType dtype = g.scalar_type();
  check_like(z, "z", g, "g");
  check_channels(bn, "bn", dtype, 4, sizes.C);
  check_channels(sums, "sums", dtype, 2, sizes.C);
  const Tensor dz = new_activation(sizes, dtype);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    const std::vector<Acc> factors = dbn_factors(const_data<Acc>(bn), const_data<Acc>(sums), sizes.C, inv_count);
    const auto kernel = FUSEDRES_BEST_ISA(dbn<T>);
    const Blocks blocks = row_blocks(sizes.rows(), sizes.C, sizeof(T));
    parallel_for_each(blocks.count(), [&](int64_t i) {
      kernel(const_data<T>(g), const_data<T>(z), factors.data(), sizes.C, mutable_data<T>(dz), blocks[i]);
    });
  });
  return dz;
}

}  // namespace fusedres::cpu
