// The binding of the kernel that computes the head in eval.
#include "cuda/head_fprop.h"
#include "emulator/bindings.h"

namespace fusedres::emulator {
namespace {

// sizes: N S C F; tensors: x w bias pooled counters y.
Totals head(const std::string& dtype, const std::array<Address, 6>& tensors, const std::array<int, 4>& sizes,
            size_t shared_limit, const Options& options) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& t = tensors;
    const auto& s = sizes;
    const cuda::HeadProblem<T> problem{at<T>(t[0]), at<T>(t[1]), at<T>(t[2]), at<T>(t[3]), at<unsigned>(t[4]),
                                       at<T>(t[5]), s[0],        s[1],        s[2],        s[3]};
    Launcher launcher{options};
    if (!cuda::head_fprop(problem, shared_limit, launcher)) throw std::invalid_argument("no tile fits");
    return totals(launcher.counters, launcher.launches);
  });
}

}  // namespace

void bind_head(pybind11::module_& module) {
  module.def("head_fprop", &head);
  module.def("head_counters", &cuda::head_counters);
}

}  // namespace fusedres::emulator
