// The native op `folded_chain`: a whole chain in eval, image by image where its maps are large.
#include <torch/csrc/stable/ops.h>

#include "cpu/conv.h"
#include "cpu/conv_run.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fusedres::cpu {
namespace {

// Geometry of one conv: stride, padding and dilation, two integers each.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;

  static Geometry of(const std::vector<int64_t>& all, int64_t conv) {
    const auto pair = [&](int64_t i) { return std::vector<int64_t>{all[6 * conv + i], all[6 * conv + i + 1]}; };
    return {pair(0), pair(2), pair(4)};
  }
};

struct Chain {
  const Tensor& x;
  const MaybeTensor& residual;
  const std::vector<Tensor>&weights, &packed, &biases;
  const std::vector<int64_t>& geometry;
  bool identity, projection, relu;

  // The convs in a row; a projection comes behind them in the vectors.
  int64_t length() const { return static_cast<int64_t>(weights.size()) - projection; }
};

Tensor run_conv(const Chain& chain, int64_t i, const Tensor& x, const MaybeTensor& residual, bool relu) {
  const Geometry g = Geometry::of(chain.geometry, i);
  return conv_fprop(x, chain.weights[i], chain.packed[i], chain.biases[i], residual, g.stride, g.padding, g.dilation,
                    relu);
}

// One conv after the other, each on all threads.
Tensor conv_by_conv(const Chain& chain) {
  MaybeTensor shortcut = chain.residual;
  if (chain.identity) shortcut = chain.x;
  if (chain.projection) shortcut = run_conv(chain, chain.length(), chain.x, std::nullopt, false);
  Tensor a = chain.x;
  for (int64_t i = 0; i + 1 < chain.length(); ++i) a = run_conv(chain, i, a, std::nullopt, true);
  return run_conv(chain, chain.length() - 1, a, shortcut, chain.relu);
}

// One conv of one image.
struct Step {
  Conv conv;
  ConvPlan plan;
  const void *packed, *bias;

  int64_t out_elements() const { return conv.output().numel(); }
};

template <typename T>
Step step_of(const Chain& chain, int64_t i, const Activation& in) {
  const Geometry g = Geometry::of(chain.geometry, i);
  const ScalarType dtype = chain.x.scalar_type();
  const Conv conv = check_conv(chain.weights[i], {1, in.C, in.H, in.W}, dtype, g.stride, g.padding, g.dilation);
  Step step{conv, fprop_plan<T>(conv, 1), const_data<void>(chain.packed[i]), const_data<void>(chain.biases[i])};
  check_tensor(chain.packed[i], "packed", dtype, {step.plan.packed_elements()});
  check_tensor(chain.biases[i], "bias", dtype, {conv.K});
  return step;
}

// Large maps of a whole batch leave the caches between two convs, those of one image do not: each thread takes an image
// through the whole chain.
template <typename T>
Tensor image_by_image(const Chain& chain) {
  const ScalarType dtype = chain.x.scalar_type();
  const Activation in = check_activation(chain.x, "x");
  std::vector<Step> steps;
  Activation at = in;
  int64_t most = 0;
  for (int64_t i = 0; i < chain.length(); ++i) {
    steps.push_back(step_of<T>(chain, i, at));
    at = steps.back().conv.output();
    if (i + 1 < chain.length()) most = std::max(most, steps.back().out_elements());
  }
  if (chain.projection) steps.push_back(step_of<T>(chain, chain.length(), in));
  const Tensor y = new_activation({in.N, at.C, at.H, at.W}, dtype);
  require(!chain.projection || steps.back().out_elements() == at.numel(), "the projection does not give ", describe(y));
  if (chain.residual) check_like(*chain.residual, "residual", y, "the output");
  if (chain.identity) check_like(chain.x, "x", y, "the output");

  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), in.N);
  const Tensor buffers = new_tensor({workers, 2, most}, dtype);
  std::vector<ConvTable<T>> tables(workers);
  share_tasks(workers, in.N, [&](int64_t worker, int64_t image) {
    const auto run_step = [&](const Step& step, const T* from, const T* residual, bool relu, T* to) {
      ConvOperands<T> operands{from, static_cast<const T*>(step.packed), to};
      operands.bias = static_cast<const T*>(step.bias);
      operands.residual = residual;
      operands.relu = relu;
      run_alone(step.plan, operands, tables[worker]);
    };
    const T* const x = const_data<T>(chain.x) + image * in.C * in.H * in.W;
    T* const out = mutable_data<T>(y) + image * at.numel();
    T* const buffer = mutable_data<T>(buffers) + worker * 2 * most;
    const T* shortcut = chain.identity   ? x
                        : chain.residual ? const_data<T>(chain.residual) + image * at.numel()
                                         : nullptr;
    if (chain.projection) {
      run_step(steps.back(), x, nullptr, false, out);
      shortcut = out;  // read where the last conv then writes
    }
    const T* from = x;
    for (int64_t i = 0; i + 1 < chain.length(); ++i) {
      T* const to = buffer + i % 2 * most;
      run_step(steps[i], from, nullptr, true, to);
      from = to;
    }
    run_step(steps[chain.length() - 1], from, shortcut, chain.relu, out);
  });
  return y;
}

// Few pixels leave a panel of weights no time to arrive, few images leave threads without work.
bool suits_image_by_image(const Chain& chain) {
  constexpr int64_t kPixels = 600;
  const Activation in = check_activation(chain.x, "x");
  const int64_t workers = torch::stable::get_num_threads();
  const bool shares_evenly = in.N % workers == 0 || in.N >= 4 * workers;
  return chain.length() > 1 && in.H * in.W >= kPixels && in.C >= 8 && shares_evenly;
}

}  // namespace

Tensor folded_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                    const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu) {
  const Chain chain{x, residual, weights, packed, biases, geometry, identity, projection, relu};
  require(chain.length() > 0 && packed.size() == weights.size() && biases.size() == weights.size() &&
              geometry.size() == 6 * weights.size(),
          "weights, packed, biases and geometry do not go together");
  if (!suits_image_by_image(chain)) return conv_by_conv(chain);
  Tensor y = x;
  for_conv_dtype(weights[0].scalar_type(), [&](auto element) { y = image_by_image<decltype(element)>(chain); });
  return y;
}

}  // namespace fusedres::cpu
