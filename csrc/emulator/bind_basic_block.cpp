// The binding of the kernel that computes a basic block in eval.
#include "cuda/basic_block_fprop.h"
#include "emulator/bindings.h"

namespace fusedres::emulator {
namespace {

// sizes: N H W C F P Q stride; tensors: x w1 w2 w_shortcut bias1 bias2 y.
Totals basic_block(const std::string& dtype, const std::array<Address, 7>& tensors, const std::array<int, 8>& sizes,
                   size_t shared_limit, int tile, const Options& options) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& t = tensors;
    const auto& s = sizes;
    const cuda::BasicBlockProblem<T> problem{at<T>(t[0]),
                                             at<T>(t[1]),
                                             at<T>(t[2]),
                                             at<T>(t[3]),
                                             at<float>(t[4]),
                                             at<float>(t[5]),
                                             at<T>(t[6]),
                                             s[0],
                                             s[1],
                                             s[2],
                                             s[3],
                                             s[4],
                                             s[5],
                                             s[6],
                                             s[7]};
    Launcher launcher{options};
    if (!cuda::basic_block_fprop(problem, shared_limit, tile, launcher)) throw std::invalid_argument("no tile fits");
    return totals(launcher.counters, launcher.launches);
  });
}

}  // namespace

void bind_basic_block(pybind11::module_& module) {
  module.def("basic_block_fprop", &basic_block);
  module.def("basic_block_shared_bytes", &cuda::basic_block_shared_bytes);
}

}  // namespace fusedres::emulator
