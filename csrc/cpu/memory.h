// Memory of activations, handed from one tensor to the next.
#pragma once

#include "cpu/checks.h"

namespace fusedres::cpu {

// Uninitialised CPU tensors. A large one takes over the memory of one that died, as
// GPU allocators do: memory fresh from the system is mapped page by page at first touch, and that costs more than the
// kernel that writes it. Small ones come from PyTorch, whose allocator recycles them well.
//
// What is kept for the next tensor never exceeds FUSEDRES_CPU_CACHE_MIB (default 1024, 0 keeps nothing; read once).
Tensor new_activation(const Activation& sizes, ScalarType dtype);        // (N, C, H, W) channels_last
Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);  // contiguous

}  // namespace fusedres::cpu
