// The binding of the kernel that computes a bottleneck in eval.
#include "cuda/bottleneck_fprop.h"
#include "emulator/bindings.h"

namespace fusedres::emulator {
namespace {

// sizes: N H W C F K P Q; tensors: x w1 w2 w3 w_shortcut bias1 bias2 bias3 y.
Totals bottleneck(const std::string& dtype, const std::array<Address, 9>& tensors, const std::array<int, 8>& sizes,
                  int stride, size_t shared_limit, int tile, const Options& options) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& t = tensors;
    const auto& s = sizes;
    const cuda::BottleneckProblem<T> problem{at<T>(t[0]),
                                             at<T>(t[1]),
                                             at<T>(t[2]),
                                             at<T>(t[3]),
                                             at<T>(t[4]),
                                             at<float>(t[5]),
                                             at<float>(t[6]),
                                             at<float>(t[7]),
                                             at<T>(t[8]),
                                             s[0],
                                             s[1],
                                             s[2],
                                             s[3],
                                             s[4],
                                             s[5],
                                             s[6],
                                             s[7]};
    Launcher launcher{options};
    if (!cuda::bottleneck_fprop(problem, stride, shared_limit, tile, launcher)) {
      throw std::invalid_argument("no tile fits");
    }
    return totals(launcher.counters, launcher.launches);
  });
}

}  // namespace

void bind_bottleneck(pybind11::module_& module) {
  module.def("bottleneck_fprop", &bottleneck);
  module.def("bottleneck_shared_bytes", &cuda::bottleneck_shared_bytes);
}

}  // namespace fusedres::emulator
