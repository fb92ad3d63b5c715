// The native CUDA op `scale_shift_add_relu`.
#include "cuda/ops.h"
#include "cuda/scale_shift_add_relu.h"
#include "cuda/tail_checks.h"

namespace fusedres::cuda {

Tensor scale_shift_add_relu(const Tensor& z, const Tensor& bn, const MaybeTensor& residual,
                            const MaybeTensor& residual_bn, bool relu) {
  const TailTensors tensors(z, "z");
  tensors.check_vectors(bn, "bn", 4);
  require(residual || !residual_bn, "residual_bn needs a residual");
  if (residual) tensors.check_map(*residual, "residual");
  if (residual_bn) tensors.check_vectors(*residual_bn, "residual_bn", 4);
  const Launcher launcher(z);
  const Tensor y = tensors.new_map();
  for_any_dtype(tensors.dtype(), [&](auto element) {
    using T = decltype(element);
    const ScaleShiftAddReluProblem<T> problem{
        data<T>(z),         data<float>(bn), data<T>(residual), data<float>(residual_bn),
        mutable_data<T>(y), tensors.rows(),  tensors.C(),       relu};
    require(scale_shift_add_relu(problem, launcher), "z is ", describe(z), ", too large");
  });
  return y;
}

}  // namespace fusedres::cuda
