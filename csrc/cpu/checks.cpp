#include "cpu/checks.h"

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
  const auto actual = tensor.sizes();
  return tensor.is_cpu() && tensor.scalar_type() == dtype &&
         std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end());
}

}  // namespace

std::string describe(const Tensor& tensor) {
  return std::string(tensor.is_cpu() ? "" : "non-CPU ") + dtype_name(tensor.scalar_type()) + " " +
         tuple(tensor.sizes()) + " with strides " + tuple(tensor.strides());
}

ScalarType acc_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

Activation check_activation(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  const bool floating = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half;
  require(tensor.is_cpu() && tensor.dim() == 4 && floating && is_channels_last(tensor), name, " is ", describe(tensor),
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
