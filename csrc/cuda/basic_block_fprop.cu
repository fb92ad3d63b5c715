// The native CUDA op `basic_block_fprop`.
#include "cuda/basic_block_fprop.h"
#include "cuda/checks.h"
#include "cuda/ops.h"

namespace fusedres::cuda {

Tensor basic_block_fprop(const Tensor& x, const Tensor& w1, const Tensor& bias1, const Tensor& w2, const Tensor& bias2,
                         const MaybeTensor& w_shortcut, int64_t stride) {
  require(x.is_cuda() && x.dim() == 4 && w1.dim() == 4, "x is ", describe(x), ", w1 ", describe(w1),
          ": expected 4-D CUDA tensors");
  require(stride == 1 || stride == 2, "stride is ", stride, ", expected 1 or 2");
  const ScalarType dtype = x.scalar_type(), f32 = ScalarType::Float;
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), F = w1.size(0);
  require(C > 0 && F > 0 && C % 8 == 0 && F % 8 == 0, "channels are ", C, " and ", F, ", expected multiples of 8");
  require(H > 0 && W > 0 && H * W < INT32_MAX && N < INT32_MAX && C < (1 << 20) && F < (1 << 20), "x is ", describe(x),
          ", too large");
  check_tensor(x, "x", x, dtype, {N, C, H, W}, 16);
  check_tensor(w1, "w1", x, dtype, {F, C, 3, 3}, 16);
  check_tensor(w2, "w2", x, dtype, {F, F, 3, 3}, 16);
  check_tensor(bias1, "bias1", x, f32, {F}, 4);
  check_tensor(bias2, "bias2", x, f32, {F}, 4);
  if (w_shortcut) {
    check_tensor(*w_shortcut, "w_shortcut", x, dtype, {F, C, 1, 1}, 16);
  } else {
    require(C == F && stride == 1, "without a projection x has ", C, " channels and stride ", stride, ", expected ", F,
            " and 1");
  }
  const int64_t P = (H - 1) / stride + 1, Q = (W - 1) / stride + 1;
  const Launcher launcher(x);
  const Tensor y = new_map(x, {N, F, P, Q});
  for_half_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto size = [](int64_t value) { return static_cast<int>(value); };
    const BasicBlockProblem<T> problem{data<T>(x),
                                       data<T>(w1),
                                       data<T>(w2),
                                       w_shortcut ? data<T>(*w_shortcut) : nullptr,
                                       data<float>(bias1),
                                       data<float>(bias2),
                                       static_cast<T*>(y.mutable_data_ptr()),
                                       size(N),
                                       size(H),
                                       size(W),
                                       size(C),
                                       size(F),
                                       size(P),
                                       size(Q),
                                       size(stride)};
    require(basic_block_fprop(problem, launcher.shared_limit(), -1, launcher), "a basic block of width ", F,
            " needs more than the ", launcher.shared_limit(), " bytes of shared memory here");
  });
  return y;
}

int64_t basic_block_shared_bytes(int64_t width) {
  require(width > 0 && width < (1 << 20), "width is ", width);
  return static_cast<int64_t>(basic_block_shared_bytes(static_cast<int>(width)));
}

}  // namespace fusedres::cuda
