// The native CUDA ops. Shapes and meaning: their kernels' headers. All check their tensors before they launch and raise
// RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

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

}  // namespace fusedres::cuda
