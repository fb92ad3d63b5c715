// The native CUDA op `dbn`.
#include "cuda/dbn.h"
#include "cuda/ops.h"
#include "cuda/tail_checks.h"

namespace fusedres::cuda {

Tensor dbn(const Tensor& g, const MaybeTensor& z, const Tensor& bn, const MaybeTensor& sums, double inv_count) {
  const TailTensors tensors(g, "g");
  tensors.check_vectors(bn, "bn", 4);
  if (z) tensors.check_map(*z, "z");
  if (sums) tensors.check_vectors(*sums, "sums", 2);
  const bool is_constant = !z || !sums || inv_count == 0;
  const Launcher launcher(g);
  const Tensor dz = tensors.new_map();
  for_any_dtype(tensors.dtype(), [&](auto element) {
    using T = decltype(element);
    const DbnProblem<T> problem{data<T>(g),          is_constant ? nullptr : data<T>(z),
                                data<float>(bn),     is_constant ? nullptr : data<float>(sums),
                                mutable_data<T>(dz), tensors.rows(),
                                tensors.C(),         static_cast<float>(inv_count)};
    require(dbn(problem, launcher), "g is ", describe(g), ", too large");
  });
  return dz;
}

}  // namespace fusedres::cuda
