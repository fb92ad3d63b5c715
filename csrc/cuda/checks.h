// What the launchers may assume of CUDA tensors, checked before anything is launched; how they launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/checks.h"
#include "cuda/launch.h"
#include "device/scalar.h"

namespace fusedres::cuda {

using cpu::describe;
using cpu::require;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check_cuda(cudaError_t status, const char* call) {
  require(status == cudaSuccess, call, ": ", cudaGetErrorString(status));
}

// A dense tensor of `dtype` and `sizes` on the device of `like`, aligned to `alignment` bytes; four sizes mean
// channels_last, (K, C, R, S) as (K, R, S, C) in memory.
inline void check_tensor(const Tensor& tensor, const char* name, const Tensor& like, ScalarType dtype,
                         const std::vector<int64_t>& sizes, size_t alignment) {
  const auto actual = tensor.sizes(), strides = tensor.strides();
  bool matches = tensor.is_cuda() && tensor.get_device_index() == like.get_device_index() &&
                 tensor.scalar_type() == dtype && actual.size() == sizes.size();
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
  if (sizes.size() == 4) order = {1, 3, 2, 0};
  const bool is_empty = tensor.numel() == 0;  // then no stride has a meaning
  int64_t stride = 1;
  for (size_t i = 0; matches && i < order.size(); ++i) {
    const size_t axis = order[i];
    matches = actual[axis] == sizes[axis] && (is_empty || sizes[axis] == 1 || strides[axis] == stride);
    stride *= sizes[axis];
  }
  std::ostringstream expected;
  for (const int64_t size : sizes) expected << " " << size;
  require(matches, name, " is ", describe(tensor), ", expected a dense (channels_last) tensor of the dtype of x on its",
          " device with sizes", expected.str());
  require(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0, name, " is not aligned to ", alignment,
          " bytes");
}

inline Tensor new_tensor(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline Tensor new_map(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls function(T{}) for the element type of a 16-bit dtype.
template <typename Function>
void for_half_dtype(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Half) return function(device::half{});
  if (dtype == ScalarType::BFloat16) return function(device::bfloat16{});
  require(false, "no CUDA kernel for ", torch::headeronly::toString(dtype), ", only for float16 and bfloat16");
}

// The same, for float32 too.
template <typename Function>
void for_any_dtype(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) return function(float{});
  for_half_dtype(dtype, function);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data(const MaybeTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The launcher of a device: PyTorch's current stream there, no synchronisation, every call checked.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : guard_(on.get_device_index()) {
    const int32_t device = on.get_device_index();
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current stream on device ", device);
    stream_ = static_cast<cudaStream_t>(stream);
    int limit = 0;
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    shared_limit_ = static_cast<size_t>(limit);
  }

  size_t shared_limit() const { return shared_limit_; }

  // Zeros before the next launch.
  void zero(void* data, size_t bytes) const { check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), "cudaMemsetAsync"); }

  template <typename Kernel, typename Problem>
  void operator()(const LaunchShape& shape, Kernel kernel, const Problem& problem) const {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        "cudaFuncSetAttribute");
    kernel<<<shape.grid, shape.threads, shape.shared_bytes, stream_>>>(problem);
    check_cuda(cudaGetLastError(), "launch");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  size_t shared_limit_ = 0;
};

}  // namespace fusedres::cuda
