// The native op `max_abs`: the largest magnitude in an activation.
#include <cmath>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/max_abs_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {

Tensor max_abs(const Tensor& x) {
  const Activation sizes = check_activation(x, "x");
  const Tensor result = new_tensor({}, ScalarType::Double);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto kernel = FUSEDRES_BEST_ISA(max_abs<T>);
    const Blocks blocks = row_blocks(sizes.numel(), 1, sizeof(T));
    std::vector<double> largest(blocks.count());
    parallel_for_each(blocks.count(), [&](int64_t i) {
      largest[i] = kernel(const_data<T>(x) + blocks[i].row_begin, blocks[i].rows());
    });
    double& all = *mutable_data<double>(result) = 0;
    for (const double value : largest)
      if (!std::isnan(all) && !(value <= all)) all = value;
  });
  return result;
}

}  // namespace fusedres::cpu
