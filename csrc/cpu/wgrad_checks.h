// What the ops around a weight gradient share.
#pragma once

#include "cpu/conv_checks.h"
#include "cpu/wgrad_contract.h"

namespace fusedres::cpu {

// `tensor` as it is, without a prologue.
template <typename T>
WgradOperand<T> plain_operand(const Tensor& tensor) {
  return {const_data<T>(tensor), tensor.size(1), tensor.size(2), tensor.size(3), tensor.numel()};
}

}  // namespace fusedres::cpu
