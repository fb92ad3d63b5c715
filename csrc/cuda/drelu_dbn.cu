// The native CUDA op `drelu_dbn`.
#include "cuda/drelu_dbn.h"
#include "cuda/ops.h"
#include "cuda/tail_checks.h"

namespace fusedres::cuda {

std::tuple<Tensor, Tensor, Tensor> drelu_dbn(const Tensor& dy, const MaybeTensor& y, const MaybeTensor& z,
                                             const MaybeTensor& bn, const MaybeTensor& residual_z,
                                             const MaybeTensor& residual_bn) {
  const TailTensors tensors(dy, "dy");
  if (y) tensors.check_map(*y, "y");
  tensors.check_branch(z, bn, "z", "bn");
  tensors.check_branch(residual_z, residual_bn, "residual_z", "residual_bn");
  const Launcher launcher(dy);
  const int C = tensors.C();
  const Tensor g = tensors.new_map(), sums = tensors.new_vectors({z ? 2 : 1, C});
  const Tensor residual_sums = residual_z ? tensors.new_vectors({2, C}) : tensors.new_vectors({0});
  for_any_dtype(tensors.dtype(), [&](auto element) {
    using T = decltype(element);
    const Tensor partials = tensors.new_vectors({drelu_dbn_parts<T>(tensors.rows(), C), kBackwardSums, C});
    const DreluDbnProblem<T> problem{data<T>(dy),
                                     data<T>(y),
                                     data<T>(z),
                                     data<float>(bn),
                                     data<T>(residual_z),
                                     data<float>(residual_bn),
                                     mutable_data<T>(g),
                                     mutable_data<float>(partials),
                                     mutable_data<float>(sums),
                                     mutable_data<float>(residual_sums),
                                     tensors.rows(),
                                     C};
    drelu_dbn(problem, launcher);
  });
  return {g, sums, residual_sums};
}

}  // namespace fusedres::cuda
