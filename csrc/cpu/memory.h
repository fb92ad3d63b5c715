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

// Uninitialised memory, 64-byte aligned, that grows with the largest of those who use it one after another, so that all
// find it in the caches.
template <typename Element>
class Buffer {
 public:
  // Throws where nothing can have these sizes.
  Element* of(const std::vector<int64_t>& sizes) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = bytes_of(sizes, sizeof(Element)) + kLine;
    if (!memory_ || memory_->numel() < bytes) {
      memory_.reset();
      memory_ = new_tensor({bytes}, ScalarType::Byte);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_->mutable_data_ptr());
    return reinterpret_cast<Element*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  std::optional<Tensor> memory_;
};

}  // namespace fusedres::cpu
