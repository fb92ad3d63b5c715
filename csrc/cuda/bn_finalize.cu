// The native CUDA op `bn_finalize`.
#include "cuda/bn_finalize.h"
#include "cuda/checks.h"
#include "cuda/ops.h"

namespace fusedres::cuda {

Tensor bn_finalize(const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& counter,
                   std::optional<double> momentum, double eps) {
  require(stats.is_cuda() && stats.dim() == 2, "stats is ", describe(stats), ": expected a 2-D CUDA tensor");
  const int64_t K = stats.size(1);
  require(K < (1 << 28), "stats is ", describe(stats), ", too many channels");
  check_tensor(stats, "stats", stats, ScalarType::Float, {3, K}, sizeof(float));
  ScalarType dtype = ScalarType::Float;  // of all vectors
  for (const MaybeTensor* vector : {&weight, &bias, &running_mean, &running_var}) {
    if (*vector) dtype = (*vector)->scalar_type();
  }
  const auto check = [&](const MaybeTensor& vector, const char* name) {
    if (vector) check_tensor(*vector, name, stats, dtype, {K}, (*vector).element_size());
  };
  check(weight, "weight");
  check(bias, "bias");
  check(running_mean, "running_mean");
  check(running_var, "running_var");
  if (counter) check_tensor(*counter, "num_batches_tracked", stats, ScalarType::Long, {}, sizeof(int64_t));
  const Launcher launcher(stats);
  const Tensor bn = new_tensor(stats, ScalarType::Float, {4, K});
  const double newest = momentum.value_or(0);
  for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto written = [](const MaybeTensor& vector) { return vector ? mutable_data<T>(*vector) : nullptr; };
    const BnFinalizeProblem<T> problem{data<float>(stats),
                                       data<T>(weight),
                                       data<T>(bias),
                                       written(running_mean),
                                       written(running_var),
                                       counter ? mutable_data<int64_t>(*counter) : nullptr,
                                       mutable_data<float>(bn),
                                       static_cast<int>(K),
                                       !momentum.has_value(),
                                       static_cast<float>(newest),
                                       static_cast<float>(1 - newest),
                                       static_cast<float>(eps)};
    bn_finalize(problem, launcher);
  });
  return bn;
}

}  // namespace fusedres::cuda
