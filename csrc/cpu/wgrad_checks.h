// What the ops around a weight gradient check alike.
#pragma once

#include <vector>

#include "cpu/checks.h"
#include "cpu/wgrad_contract.h"

namespace fusedres::cpu {

// Two integers of at least `least`, and small enough that sums of their products are far from overflow.
void check_pair(const std::vector<int64_t>& pair, const char* name, int64_t least);

// `tensor` as it is, without a prologue.
template <typename T>
WgradOperand<T> plain_operand(const Tensor& tensor) {
  return {const_data<T>(tensor), tensor.size(1), tensor.size(2), tensor.size(3), tensor.numel()};
}

}  // namespace fusedres::cpu
