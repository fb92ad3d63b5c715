// The bindings of the kernels of a training step's tails and statistics.
#include "cuda/bn_finalize.h"
#include "cuda/channel_stats.h"
#include "cuda/dbn.h"
#include "cuda/drelu_dbn.h"
#include "cuda/scale_shift_add_relu.h"
#include "emulator/bindings.h"

namespace fusedres::emulator {
namespace {

// tensors: z bn residual residual_bn y.
Totals scale_shift_add_relu(const std::string& dtype, const std::array<Address, 5>& t, int64_t rows, int C, bool relu,
                            const Options& options) {
  return for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Launcher launcher{options};
    const cuda::ScaleShiftAddReluProblem<T> problem{
        at<T>(t[0]), at<float>(t[1]), at<T>(t[2]), at<float>(t[3]), at<T>(t[4]), rows, C, relu};
    if (!cuda::scale_shift_add_relu(problem, launcher)) throw std::invalid_argument("too large");
    return totals(launcher.counters, launcher.launches);
  });
}

// tensors: dy y z bn residual_z residual_bn g partials sums residual_sums.
Totals drelu_dbn(const std::string& dtype, const std::array<Address, 10>& t, int64_t rows, int C,
                 const Options& options) {
  return for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Launcher launcher{options};
    const cuda::DreluDbnProblem<T> problem{at<T>(t[0]),     at<T>(t[1]),     at<T>(t[2]), at<float>(t[3]),
                                           at<T>(t[4]),     at<float>(t[5]), at<T>(t[6]), at<float>(t[7]),
                                           at<float>(t[8]), at<float>(t[9]), rows,        C};
    cuda::drelu_dbn(problem, launcher);
    return totals(launcher.counters, launcher.launches);
  });
}

// tensors: g z bn sums dz.
Totals dbn(const std::string& dtype, const std::array<Address, 5>& t, int64_t rows, int C, float inv_count,
           const Options& options) {
  return for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Launcher launcher{options};
    const cuda::DbnProblem<T> problem{at<T>(t[0]), at<T>(t[1]), at<float>(t[2]), at<float>(t[3]), at<T>(t[4]),
                                      rows,        C,           inv_count};
    if (!cuda::dbn(problem, launcher)) throw std::invalid_argument("too large");
    return totals(launcher.counters, launcher.launches);
  });
}

// tensors: x parts stats.
Totals channel_stats(const std::string& dtype, const std::array<Address, 3>& t, int64_t rows, int C,
                     const Options& options) {
  return for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Launcher launcher{options};
    const cuda::ChannelStatsProblem<T> problem{at<T>(t[0]), at<float>(t[1]), at<float>(t[2]), rows, C};
    cuda::channel_stats(problem, launcher);
    return totals(launcher.counters, launcher.launches);
  });
}

// dtype: of weight, bias and running statistics; tensors: stats weight bias running_mean running_var counter bn.
Totals bn_finalize(const std::string& dtype, const std::array<Address, 7>& t, int K, bool cumulative, double momentum,
                   double eps, const Options& options) {
  return for_any_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Launcher launcher{options};
    const cuda::BnFinalizeProblem<T> problem{at<float>(t[0]),
                                             at<T>(t[1]),
                                             at<T>(t[2]),
                                             at<T>(t[3]),
                                             at<T>(t[4]),
                                             at<int64_t>(t[5]),
                                             at<float>(t[6]),
                                             K,
                                             cumulative,
                                             static_cast<float>(momentum),
                                             static_cast<float>(1 - momentum),
                                             static_cast<float>(eps)};
    cuda::bn_finalize(problem, launcher);
    return totals(launcher.counters, launcher.launches);
  });
}

// How many parts a reduction leaves: those of drelu_dbn, and those of channel_stats.
template <typename T>
std::pair<int64_t, int64_t> parts_of(int64_t rows, int C) {
  return {cuda::drelu_dbn_parts<T>(rows, C), cuda::channel_stats_parts<T>(rows, C)};
}

}  // namespace

void bind_tails(pybind11::module_& module) {
  module.def("scale_shift_add_relu", &scale_shift_add_relu);
  module.def("drelu_dbn", &drelu_dbn);
  module.def("dbn", &dbn);
  module.def("channel_stats", &channel_stats);
  module.def("bn_finalize", &bn_finalize);
  module.def("reduction_parts", [](const std::string& dtype, int64_t rows, int C) {
    return for_any_dtype(dtype, [&](auto element) { return parts_of<decltype(element)>(rows, C); });
  });
}

}  // namespace fusedres::emulator
