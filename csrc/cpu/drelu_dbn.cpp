// The native ops `drelu_dbn` and `drelu_dbn_`: the backward tail.
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace fusedres::cpu {
namespace {

// Where the ReLU's mask comes from: there was none, its output y, or scale*z + shift of the first branch.
enum class Mask { none, output, recomputed };

// Activations are of type T, bn (4, channels) of acc_t<T>; the branches in use come first.
struct BackwardTail {
  const void *dy, *y, *z[2], *bn[2];
  void* g;
  int64_t channels;
};

}  // namespace
}  // namespace fusedres::cpu

#define FUSEDRES_KERNELS "cpu/drelu_dbn_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

using Kernel = void (*)(const BackwardTail&, const Block&, double* state, void* scratch);

template <typename T, Mask kMask>
Kernel kernel_for(int branches) {
  if constexpr (kMask != Mask::recomputed) {
    if (branches == 0) return FUSEDRES_BEST_ISA(drelu_dbn<T, kMask, 0>);
    if (branches == 2) return FUSEDRES_BEST_ISA(drelu_dbn<T, kMask, 2>);
  }
  return FUSEDRES_BEST_ISA(drelu_dbn<T, kMask, 1>);
}

template <typename T>
Kernel kernel_for(Mask mask, int branches) {
  if (mask == Mask::recomputed) return kernel_for<T, Mask::recomputed>(branches);
  return mask == Mask::output ? kernel_for<T, Mask::output>(branches) : kernel_for<T, Mask::none>(branches);
}

// Runs the tail and returns the totals (1 + branches, channels): sum(g), then sum(g*(z - mean)) per branch.
template <typename T>
std::vector<double> run(const BackwardTail& tail, Mask mask, int branches, int64_t rows) {
  const Kernel kernel = kernel_for<T>(mask, branches);
  const Blocks blocks = reduction_blocks(rows, tail.channels, sizeof(T));
  return reduce<acc_t<T>>(blocks, 1 + branches, [&](const Block& block, double* state, acc_t<T>* scratch) {
    kernel(tail, block, state, scratch);
  });
}

// The masked gradient goes to `g`, like `dy`, or `dy` itself. Returns the sums of both branches.
std::tuple<Tensor, Tensor> write_tail(const Tensor& dy, const Tensor& g, const MaybeTensor& y, const MaybeTensor& z,
                                      const MaybeTensor& bn, const MaybeTensor& residual_z,
                                      const MaybeTensor& residual_bn) {
  const Activation sizes = check_activation(dy, "dy");
  const ScalarType dtype = dy.scalar_type();
  if (y) check_like(*y, "y", dy, "dy");
  require(z.has_value() == bn.has_value(), "z and bn go together");
  require(residual_z.has_value() == residual_bn.has_value(), "residual_z and residual_bn go together");
  if (z) {
    check_like(*z, "z", dy, "dy");
    check_channels(*bn, "bn", dtype, 4, sizes.C);
  }
  if (residual_z) {
    check_like(*residual_z, "residual_z", dy, "dy");
    check_channels(*residual_bn, "residual_bn", dtype, 4, sizes.C);
  }
  const Tensor sums = new_tensor({z ? 2 : 1, sizes.C}, acc_dtype(dtype));
  const Tensor residual_sums =
      residual_z ? new_tensor({2, sizes.C}, acc_dtype(dtype)) : new_tensor({0}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    BackwardTail tail{const_data<void>(dy), const_data<void>(y), {}, {}, g.mutable_data_ptr(), sizes.C};
    int branches = 0;
    for (const auto& [branch_z, branch_bn] : {std::pair{&z, &bn}, {&residual_z, &residual_bn}}) {
      if (!branch_z->has_value()) continue;
      tail.z[branches] = const_data<void>(*branch_z);
      tail.bn[branches++] = const_data<void>(*branch_bn);
    }
    const std::vector<double> totals = run<T>(tail, y ? Mask::output : Mask::none, branches, sizes.rows());
    const double* dbeta = totals.data();
    write_sums(dbeta, z ? dbeta + sizes.C : nullptr, const_data<Acc>(bn), sizes.C, mutable_data<Acc>(sums));
    if (residual_z) {
      write_sums(dbeta, dbeta + branches * sizes.C, const_data<Acc>(residual_bn), sizes.C,
                 mutable_data<Acc>(residual_sums));
    }
  });
  return {sums, residual_sums};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> drelu_dbn(const Tensor& dy, const MaybeTensor& y, const MaybeTensor& z,
                                             const MaybeTensor& bn, const MaybeTensor& residual_z,
                                             const MaybeTensor& residual_bn) {
  const Tensor g = new_activation(check_activation(dy, "dy"), dy.scalar_type());
  const auto [sums, residual_sums] = write_tail(dy, g, y, z, bn, residual_z, residual_bn);
  return {g, sums, residual_sums};
}

std::tuple<Tensor, Tensor> drelu_dbn_by_output_inplace(const Tensor& dy, const Tensor& y, const MaybeTensor& z,
                                                       const MaybeTensor& bn, const MaybeTensor& residual_z,
                                                       const MaybeTensor& residual_bn) {
  return write_tail(dy, dy, y, z, bn, residual_z, residual_bn);
}

Tensor drelu_dbn_inplace(const Tensor& dx, const Tensor& prev_z, const Tensor& prev_bn) {
  const Activation sizes = check_activation(dx, "dx");
  const ScalarType dtype = dx.scalar_type();
  check_like(prev_z, "prev_z", dx, "dx");
  check_channels(prev_bn, "prev_bn", dtype, 4, sizes.C);
  const Tensor sums = new_tensor({2, sizes.C}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    void* gradient = dx.mutable_data_ptr();
    const BackwardTail tail{gradient, nullptr, {const_data<void>(prev_z)}, {const_data<void>(prev_bn)},
                            gradient, sizes.C};
    const std::vector<double> totals = run<T>(tail, Mask::recomputed, 1, sizes.rows());
    write_sums(totals.data(), totals.data() + sizes.C, const_data<Acc>(prev_bn), sizes.C, mutable_data<Acc>(sums));
  });
  return sums;
}

}  // namespace fusedres::cpu
