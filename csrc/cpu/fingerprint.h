// The native op `fingerprint`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fusedres::cpu {

// A 64-bit hash of dtypes, sizes, strides and every byte of the CPU tensors, in order: an int64 scalar tensor.
torch::stable::Tensor fingerprint(std::vector<torch::stable::Tensor> tensors);

}  // namespace fusedres::cpu
