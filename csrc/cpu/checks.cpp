#include "cpu/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

namespace fusedres::cpu {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <typename Sequence>
std::string tuple(const Sequence& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

bool is_channels_last(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t stride = 1;
  for (const int axis : {1, 3, 2, 0}) {
    if (sizes[axis] != 1 && strides[axis] != stride) return false;
    stride *= sizes[axis];
  }
  return true;
}

bool is_cpu_tensor(const Tensor& tensor, ScalarType dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  if (!is_readable(tensor) || tensor.scalar_type() != dtype) return false;
  const auto actual = tensor.sizes();
  return std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end());
}

int64_t storage_bytes(const Tensor& tensor) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return bytes;
}

}  // namespace

std::string describe(const Tensor& tensor) {
  if (!tensor.defined()) return "None";
  const char* const where = !tensor.is_cpu() ? "non-CPU " : is_readable(tensor) ? "" : "memory too small for ";
  return std::string(where) + dtype_name(tensor.scalar_type()) + " " + tuple(tensor.sizes()) + " with strides " +
         tuple(tensor.strides());
}

std::string describe(const Activation& a) { return tuple(std::vector<int64_t>{a.N, a.C, a.H, a.W}); }

int64_t bytes_of(const std::vector<int64_t>& sizes, int64_t element_size) {
  int64_t bytes = element_size;  // as if there were no axis of size 0: strides are products of the others
  bool fits = true;
  for (const int64_t size : sizes) fits = fits && !__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes);
  require(fits, "no memory holds a tensor ", tuple(sizes));
  return std::count(sizes.begin(), sizes.end(), 0) > 0 ? 0 : bytes;
}

bool is_readable(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu()) return false;
  if (tensor.numel() == 0) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t end = tensor.storage_offset() + 1;
  for (size_t axis = 0; axis < sizes.size(); ++axis) end += (sizes[axis] - 1) * strides[axis];
  return end * static_cast<int64_t>(tensor.element_size()) <= storage_bytes(tensor);
}

ScalarType acc_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

Activation check_activation(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.defined() ? tensor.scalar_type() : ScalarType::Undefined;
  const bool floating = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half;
  require(is_readable(tensor) && tensor.dim() == 4 && floating && is_channels_last(tensor), name, " is ",
          describe(tensor),
          ", expected a dense channels_last (N, C, H, W) CPU tensor of float64, float32, bfloat16 or float16");
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

void check_channels_last(const Tensor& tensor, const char* name, ScalarType dtype, const Activation& sizes) {
  const std::vector<int64_t> expected{sizes.N, sizes.C, sizes.H, sizes.W};
  require(is_cpu_tensor(tensor, dtype, expected) && is_channels_last(tensor), name, " is ", describe(tensor),
          ", expected a dense channels_last ", dtype_name(dtype), " CPU tensor ", tuple(expected));
}

void check_like(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  require(is_cpu_tensor(tensor, like.scalar_type(), like.sizes()) && is_channels_last(tensor), name, " is ",
          describe(tensor), ", expected it dense channels_last with the sizes and dtype of ", like_name, ": ",
          describe(like));
}

void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  require(is_cpu_tensor(tensor, dtype, sizes) && tensor.is_contiguous(), name, " is ", describe(tensor),
          ", expected a contiguous ", dtype_name(dtype), " CPU tensor ", tuple(sizes));
}

void check_channels(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows, int64_t channels) {
  check_tensor(tensor, name, acc_dtype(dtype), {rows, channels});
}

}  // namespace fusedres::cpu
