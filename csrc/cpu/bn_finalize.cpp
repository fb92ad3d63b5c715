// The native op `bn_finalize`.
#include <cmath>

#include "cpu/checks.h"
#include "cpu/memory.h"
#include "cpu/ops.h"

namespace fusedres::cpu {
namespace {

// (1 - weight)*running + weight*batch, if there is a running value.
template <typename T>
void average(T* running, int64_t k, double weight, double batch) {
  if (running != nullptr) running[k] = static_cast<T>((1 - weight) * running[k] + weight * batch);
}

}  // namespace

Tensor bn_finalize(const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& running_mean, const MaybeTensor& running_var,
                   const MaybeTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const ScalarType dtype = stats.scalar_type();
  require(stats.dim() == 2 && acc_dtype(dtype) == dtype, "stats is ", describe(stats),
          ", expected float32 or float64 (3, K)");
  const int64_t K = stats.size(1);
  check_tensor(stats, "stats", dtype, {3, K});
  const auto check = [&](const MaybeTensor& vector, const char* name) {
    if (vector) check_tensor(*vector, name, dtype, {K});
  };
  check(weight, "weight");
  check(bias, "bias");
  check(running_mean, "running_mean");
  check(running_var, "running_var");
  if (num_batches_tracked) check_tensor(*num_batches_tracked, "num_batches_tracked", ScalarType::Long, {});
  const Tensor bn = new_tensor({4, K}, dtype);
  for_dtype(dtype, [&](auto element) {
    using T = acc_t<decltype(element)>;
    double newest = momentum.value_or(0);  // the weight of this batch
    if (num_batches_tracked) {
      const int64_t batches = ++*mutable_data<int64_t>(*num_batches_tracked);
      if (!momentum) newest = 1.0 / batches;
    }
    const T *const count = const_data<T>(stats), *const mean = count + K, *const m2 = mean + K;
    const T *const gamma = const_data<T>(weight), *const beta = const_data<T>(bias);
    T* const running_means = running_mean ? mutable_data<T>(*running_mean) : nullptr;
    T* const running_vars = running_var ? mutable_data<T>(*running_var) : nullptr;
    T* const row = mutable_data<T>(bn);
    for (int64_t k = 0; k < K; ++k) {
      const double sum = m2[k], invstd = 1 / std::sqrt(sum / count[k] + eps);
      const double scale = gamma == nullptr ? invstd : gamma[k] * invstd;
      row[k] = mean[k];
      row[K + k] = static_cast<T>(invstd);
      row[2 * K + k] = static_cast<T>(scale);
      row[3 * K + k] = static_cast<T>((beta == nullptr ? 0.0 : beta[k]) - mean[k] * scale);
      average(running_means, k, newest, mean[k]);
      average(running_vars, k, newest, sum / (count[k] - 1.0));
    }
  });
  return bn;
}

}  // namespace fusedres::cpu
