// The binding of the kernel that computes the stem in eval.
#include "cuda/stem_fprop.h"
#include "emulator/bindings.h"

namespace fusedres::emulator {
namespace {

// sizes: N H W C K P Q U V; tensors: x w bias y.
Totals stem(const std::string& dtype, const std::array<Address, 4>& tensors, const std::array<int, 9>& sizes,
            int filter, size_t shared_limit, const Options& options) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& t = tensors;
    const auto& s = sizes;
    const cuda::StemProblem<T> problem{
        at<T>(t[0]), at<T>(t[1]), at<float>(t[2]), at<T>(t[3]), s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
    Launcher launcher{options};
    if (!cuda::stem_fprop(problem, filter, shared_limit, launcher)) throw std::invalid_argument("no tile fits");
    return totals(launcher.counters, launcher.launches);
  });
}

}  // namespace

void bind_stem(pybind11::module_& module) { module.def("stem_fprop", &stem); }

}  // namespace fusedres::emulator
