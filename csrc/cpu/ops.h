// The native ops. Schemas: fusedres/native.py; shapes and meaning: fusedres/ops.py. All check their tensors before they
// touch memory and raise RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fusedres::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Tensor channel_stats(const Tensor& z);

// Moves the running statistics and the counter.
Tensor bn_finalize(const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& running_mean, const MaybeTensor& running_var,
                   const MaybeTensor& num_batches_tracked, std::optional<double> momentum, double eps);

Tensor scale_shift_add_relu(const Tensor& z, const Tensor& bn, const MaybeTensor& residual,
                            const MaybeTensor& residual_bn, bool relu);

std::tuple<Tensor, Tensor, Tensor> drelu_dbn(const Tensor& dy, const MaybeTensor& y, const MaybeTensor& z,
                                             const MaybeTensor& bn, const MaybeTensor& residual_z,
                                             const MaybeTensor& residual_bn);

Tensor drelu_dbn_inplace(const Tensor& dx, const Tensor& prev_z, const Tensor& prev_bn);

std::tuple<Tensor, Tensor> drelu_dbn_by_output_inplace(const Tensor& dy, const Tensor& y, const MaybeTensor& z,
                                                       const MaybeTensor& bn, const MaybeTensor& residual_z,
                                                       const MaybeTensor& residual_bn);

Tensor dbn(const Tensor& g, const Tensor& z, const Tensor& bn, const Tensor& sums, double inv_count);

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& z, const Tensor& bn, int64_t kernel_size, int64_t stride,
                                           int64_t padding);

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward(const Tensor& dy, const Tensor& tap, const Tensor& z,
                                                    const Tensor& bn, int64_t kernel_size, int64_t stride,
                                                    int64_t padding, double inv_count);

// The largest magnitude in an activation, NaN if it holds one: a float64 scalar tensor.
Tensor max_abs(const Tensor& x);

// A 64-bit hash of dtypes, sizes, strides and every byte of the tensors, in order: an int64 scalar tensor.
Tensor fingerprint(const std::vector<Tensor>& tensors);

}  // namespace fusedres::cpu
