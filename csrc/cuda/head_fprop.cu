// The native CUDA op `head_fprop`.
#include "cuda/checks.h"
#include "cuda/head_fprop.h"
#include "cuda/ops.h"

namespace fusedres::cuda {

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias) {
  require(x.is_cuda() && x.dim() == 4 && w.dim() == 2, "x is ", describe(x), ", w ", describe(w),
          ": expected a 4-D and a 2-D CUDA tensor");
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), F = w.size(0);
  require(C > 0 && C % 8 == 0, "channels are ", C, ", expected a multiple of 8");
  require(H > 0 && W > 0 && F > 0 && H * W < INT32_MAX && N < INT32_MAX && C < (1 << 20) && F < INT32_MAX, "x is ",
          describe(x), ", w ", describe(w), ", empty or too large");
  check_tensor(x, "x", x, dtype, {N, C, H, W}, 16);
  check_tensor(w, "w", x, dtype, {F, C}, 16);
  if (bias) check_tensor(*bias, "bias", x, dtype, {F}, 2);
  const Launcher launcher(x);
  const Tensor y = new_tensor(x, dtype, {N, F}), pooled = new_tensor(x, dtype, {N, C});
  const Tensor counters = new_tensor(x, ScalarType::Int, {head_counters(N)});
  launcher.zero(counters.mutable_data_ptr(), sizeof(unsigned) * head_counters(N));
  for_half_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto size = [](int64_t value) { return static_cast<int>(value); };
    const HeadProblem<T> problem{data<T>(x),
                                 data<T>(w),
                                 bias ? data<T>(*bias) : nullptr,
                                 static_cast<T*>(pooled.mutable_data_ptr()),
                                 static_cast<unsigned*>(counters.mutable_data_ptr()),
                                 static_cast<T*>(y.mutable_data_ptr()),
                                 size(N),
                                 size(H * W),
                                 size(C),
                                 size(F)};
    require(head_fprop(problem, launcher.shared_limit(), launcher), "the head is too large");
  });
  return y;
}

}  // namespace fusedres::cuda
