// The native CUDA ops. Shapes and meaning: their kernels' headers. All check their tensors before they launch and raise
// RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fusedres::cuda {

// x (N, C, H, W), w1 (F, C, 1, 1), w2 (F, F, 3, 3), w3 (K, F, 1, 1), w_shortcut (K, C, 1, 1) or none: float16 or
// bfloat16, channels_last. Biases float32; bias3 includes the projection's.
torch::stable::Tensor bottleneck_fprop(const torch::stable::Tensor& x, const torch::stable::Tensor& w1,
                                       const torch::stable::Tensor& bias1, const torch::stable::Tensor& w2,
                                       const torch::stable::Tensor& bias2, const torch::stable::Tensor& w3,
                                       const torch::stable::Tensor& bias3,
                                       const std::optional<torch::stable::Tensor>& w_shortcut, int64_t stride);

// What a thread block of the kernel takes of dynamic shared memory at least, in bytes.
int64_t bottleneck_shared_bytes(int64_t width, int64_t stride);
int64_t basic_block_shared_bytes(int64_t width);

// x (N, C, H, W), w1 (F, C, 3, 3), w2 (F, F, 3, 3), w_shortcut (F, C, 1, 1) or none, as above.
torch::stable::Tensor basic_block_fprop(const torch::stable::Tensor& x, const torch::stable::Tensor& w1,
                                        const torch::stable::Tensor& bias1, const torch::stable::Tensor& w2,
                                        const torch::stable::Tensor& bias2,
                                        const std::optional<torch::stable::Tensor>& w_shortcut, int64_t stride);

// x (N, C <= 4, H, W), w the conv's weight, channels and columns padded with zeros: (K, 4, 7, 8), stride 2 and a max
// pool behind it, or (K, 4, 3, 4), stride 1. bias (K,) float32.
torch::stable::Tensor stem_fprop(const torch::stable::Tensor& x, const torch::stable::Tensor& w,
                                 const torch::stable::Tensor& bias);

// x (N, C, H, W) as above, w (F, C) and bias (F,) or none of its dtype: the fully connected layer of x's means, (N, F).
torch::stable::Tensor head_fprop(const torch::stable::Tensor& x, const torch::stable::Tensor& w,
                                 const std::optional<torch::stable::Tensor>& bias);

// The ops of fusedres/ops.py of these names, and channel_stats: z (N, C, H, W) -> (3, C) rows count, mean, M2. All
// activations are channels_last and of one dtype, float32, float16 or bfloat16, aligned to 16 bytes where C elements
// are a multiple of 16 bytes; other vectors float32. The vectors of bn_finalize are of one of those dtypes, too.
torch::stable::Tensor scale_shift_add_relu(const torch::stable::Tensor& z, const torch::stable::Tensor& bn,
                                           const std::optional<torch::stable::Tensor>& residual,
                                           const std::optional<torch::stable::Tensor>& residual_bn, bool relu);
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> drelu_dbn(
    const torch::stable::Tensor& dy, const std::optional<torch::stable::Tensor>& y,
    const std::optional<torch::stable::Tensor>& z, const std::optional<torch::stable::Tensor>& bn,
    const std::optional<torch::stable::Tensor>& residual_z, const std::optional<torch::stable::Tensor>& residual_bn);
torch::stable::Tensor dbn(const torch::stable::Tensor& g, const std::optional<torch::stable::Tensor>& z,
                          const torch::stable::Tensor& bn, const std::optional<torch::stable::Tensor>& sums,
                          double inv_count);
torch::stable::Tensor channel_stats(const torch::stable::Tensor& z);
torch::stable::Tensor bn_finalize(const torch::stable::Tensor& stats,
                                  const std::optional<torch::stable::Tensor>& weight,
                                  const std::optional<torch::stable::Tensor>& bias,
                                  const std::optional<torch::stable::Tensor>& running_mean,
                                  const std::optional<torch::stable::Tensor>& running_var,
                                  const std::optional<torch::stable::Tensor>& counter, std::optional<double> momentum,
                                  double eps);

}  // namespace fusedres::cuda
