// What a kernel may assume of its tensors: checked here, before any memory is touched. RuntimeError names shape and
// dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/dtypes.h"

namespace fusedres::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "float32 (8, 64, 56, 56) with strides (200704, 1, 3584, 64)"
std::string describe(const Tensor& tensor);

// Throws std::runtime_error (Python's RuntimeError) with all parts joined, unless the condition holds.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "fusedres: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Bytes of a tensor of these sizes with elements of `element_size`; throws where no tensor can have them. Called before
// anything is computed from sizes that a caller chose freely.
int64_t bytes_of(const std::vector<int64_t>& sizes, int64_t element_size);

// A CPU tensor whose storage holds all its elements: it may have been resized under the tensor, as FSDP does.
bool is_readable(const Tensor& tensor);

// The dtype of statistics and per-channel vectors of `dtype` activations.
ScalarType acc_dtype(ScalarType dtype);

// An activation (N, C, H, W) seen as a matrix of rows = N*H*W pixels by C channels.
struct Activation {
  int64_t N, C, H, W;

  bool operator==(const Activation& other) const {
    return N == other.N && C == other.C && H == other.H && W == other.W;
  }
  int64_t rows() const { return N * H * W; }
  int64_t numel() const { return rows() * C; }
};

// "(8, 64, 56, 56)"
std::string describe(const Activation& sizes);

// A 4-D float64 | float32 | bfloat16 | float16 CPU tensor, dense channels_last. The stride of an axis of size 1 (or of
// a tensor without elements) has no meaning and may be anything.
Activation check_activation(const Tensor& tensor, const char* name);

// A dense channels_last tensor of `dtype` and `sizes`.
void check_channels_last(const Tensor& tensor, const char* name, ScalarType dtype, const Activation& sizes);

// An activation of the same sizes and dtype as `like`.
void check_like(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name);

// A contiguous CPU tensor of `dtype` and `sizes`.
void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes);

// bn (4, C), sums (2, C), ...: a contiguous (rows, C) tensor in the accumulation dtype of activation dtype `dtype`.
void check_channels(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows, int64_t channels);

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls function(T{}) for the element type of an activation dtype: for_dtype(dtype, [&](auto t) { using T =
// decltype(t); ... })
template <typename Function>
void for_dtype(ScalarType dtype, Function&& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Float16{});
    default:
      require(false, "no kernel for ", torch::headeronly::toString(dtype));
  }
}

}  // namespace fusedres::cpu
