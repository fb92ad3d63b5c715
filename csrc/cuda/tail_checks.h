// What the tails' launchers ask of their tensors.
#pragma once

#include "cuda/checks.h"

namespace fusedres::cuda {

// The activation (N, C, H, W) that an op is told first; the others are like it.
class TailTensors {
 public:
  TailTensors(const Tensor& first, const char* name) : first_(first) {
    const ScalarType dtype = first.scalar_type();
    require(first.is_cuda() && first.dim() == 4, name, " is ", describe(first), ": expected a 4-D CUDA tensor");
    require(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "no CUDA kernel for ", torch::headeronly::toString(dtype));
    sizes_ = {first.size(0), first.size(1), first.size(2), first.size(3)};
    require(sizes_[1] < kMostChannels, name, " is ", describe(first), ", too many channels");
    check_map(first, name);
  }

  int64_t rows() const { return sizes_[0] * sizes_[2] * sizes_[3]; }
  int C() const { return static_cast<int>(sizes_[1]); }
  ScalarType dtype() const { return first_.scalar_type(); }

  // Accesses of 16 bytes are made where C is a multiple of as many elements.
  void check_map(const Tensor& tensor, const char* name) const {
    const int64_t size = first_.element_size();
    check_tensor(tensor, name, first_, dtype(), sizes_, C() * size % 16 == 0 ? 16 : size);
  }
  // bn (4, C), sums (2, C): float32.
  void check_vectors(const Tensor& tensor, const char* name, int64_t vectors) const {
    check_tensor(tensor, name, first_, ScalarType::Float, {vectors, C()}, sizeof(float));
  }
  // A map and its bn, or neither.
  void check_branch(const MaybeTensor& map, const MaybeTensor& bn, const char* map_name, const char* bn_name) const {
    require(map.has_value() == bn.has_value(), map_name, " and ", bn_name, " go together");
    if (!map) return;
    check_map(*map, map_name);
    check_vectors(*bn, bn_name, 4);
  }

  Tensor new_map() const { return cuda::new_map(first_, sizes_); }
  Tensor new_vectors(const std::vector<int64_t>& sizes) const { return new_tensor(first_, ScalarType::Float, sizes); }

 private:
  static constexpr int64_t kMostChannels = 1 << 28;
  const Tensor& first_;
  std::vector<int64_t> sizes_;
};

}  // namespace fusedres::cuda
