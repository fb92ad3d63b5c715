// The native CUDA op `stem_fprop`.
#include "cuda/checks.h"
#include "cuda/ops.h"
#include "cuda/stem_fprop.h"

namespace fusedres::cuda {

Tensor stem_fprop(const Tensor& x, const Tensor& w, const Tensor& bias) {
  require(x.is_cuda() && x.dim() == 4 && w.dim() == 4, "x is ", describe(x), ", w ", describe(w),
          ": expected 4-D CUDA tensors");
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), K = w.size(0);
  require(C >= 1 && C <= 4 && K > 0 && K % 8 == 0, "channels are ", C, " and ", K,
          ", expected at most 4 and a multiple of 8");
  require(H > 0 && W > 0 && H * W < INT32_MAX && N < INT32_MAX, "x is ", describe(x), ", too large");
  check_tensor(x, "x", x, dtype, {N, C, H, W}, 2);
  const bool pooled = w.size(2) == 7;
  check_tensor(w, "w", x, dtype, pooled ? std::vector<int64_t>{K, 4, 7, 8} : std::vector<int64_t>{K, 4, 3, 4}, 16);
  check_tensor(bias, "bias", x, ScalarType::Float, {K}, 4);
  const auto halved = [&](int64_t size) { return pooled ? (size - 1) / 2 + 1 : size; };
  const int64_t P = halved(H), Q = halved(W), U = halved(P), V = halved(Q);
  const Launcher launcher(x);
  const Tensor y = new_map(x, {N, K, U, V});
  for_half_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto size = [](int64_t value) { return static_cast<int>(value); };
    const StemProblem<T> problem{data<T>(x), data<T>(w), data<float>(bias), static_cast<T*>(y.mutable_data_ptr()),
                                 size(N),    size(H),    size(W),           size(C),
                                 size(K),    size(P),    size(Q),           size(U),
                                 size(V)};
    require(stem_fprop(problem, pooled ? 7 : 3, launcher.shared_limit(), launcher),
            "the stem needs more shared memory than there is");
  });
  return y;
}

}  // namespace fusedres::cuda
