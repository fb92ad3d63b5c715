// The native op `eval_chain`: a whole chain with constant BN, image by image where its maps are large.
#include <torch/csrc/stable/ops.h>

#include <cmath>

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
  const std::vector<Tensor>&weights, &packed, &affines;
  const std::vector<int64_t>& geometry;
  bool identity, projection, relu;

  // The convs in a row; a projection comes behind them in the vectors.
  int64_t length() const { return static_cast<int64_t>(weights.size()) - projection; }
  EvalWeight weight(int64_t i, const MaybeTensor& scratch) const {
    return {weights[i], packed.empty() ? MaybeTensor() : packed[i], scratch};
  }
};

// As many elements as the panels of a weight have, by either algorithm.
template <typename T>
int64_t most_packed_elements(const Tensor& w) {
  const ConvTile tile = best_conv_tile<T>();
  const bool is_3x3 = w.size(2) == 3 && w.size(3) == 3;
  const int64_t rows = is_3x3 ? kFrequencies * (w.size(1) | 1) : w.size(2) * w.size(3) * w.size(1);
  return ceil_div(w.size(0), tile.channels) * tile.channels * rows;
}

// One conv after the other, each on all threads. Their panels lie in the same memory, which so stays in the caches.
template <typename T>
Tensor conv_by_conv(const Chain& chain) {
  MaybeTensor scratch;
  if (chain.packed.empty()) {
    int64_t most = 0;
    for (const Tensor& w : chain.weights) most = std::max(most, most_packed_elements<T>(w));
    scratch = new_tensor({most}, chain.weights[0].scalar_type());
  }
  const auto run_conv = [&](int64_t i, const Tensor& x, const MaybeTensor& residual, bool relu) {
    const Geometry g = Geometry::of(chain.geometry, i);
    return conv_affine(x, chain.weight(i, scratch), chain.affines[i], residual, g.stride, g.padding, g.dilation, relu);
  };
  const int64_t last = chain.length() - 1;
  MaybeTensor shortcut = chain.residual;
  if (chain.identity) shortcut = chain.x;
  if (chain.projection) shortcut = run_conv(chain.length(), chain.x, std::nullopt, false);
  Tensor a = chain.x;
  for (int64_t i = 0; i < last; ++i) a = run_conv(i, a, std::nullopt, true);
  return run_conv(last, a, shortcut, chain.relu);
}

// One conv of one image.
struct Step {
  Conv conv;
  ConvPlan plan;
  const Tensor& w;
  Tensor packed, affine;

  int64_t out_elements() const { return conv.output().numel(); }
};

// Every conv of the chain on one image, a projection last.
std::vector<Conv> convs_of_image(const Chain& chain) {
  const Activation in = check_activation(chain.x, "x");
  std::vector<Conv> convs;
  Activation at{1, in.C, in.H, in.W};
  for (int64_t i = 0; i < chain.length() + chain.projection; ++i) {
    if (i == chain.length()) at = {1, in.C, in.H, in.W};
    const Geometry g = Geometry::of(chain.geometry, i);
    convs.push_back(check_conv(chain.weights[i], at, chain.x.scalar_type(), g.stride, g.padding, g.dilation));
    at = convs.back().output();
  }
  return convs;
}

template <typename T>
Step step_of(const Chain& chain, int64_t i, const Conv& conv) {
  const ScalarType dtype = chain.x.scalar_type();
  const ConvPlan plan = fprop_plan<T>(conv, 1, Weights::kPacked);
  MaybeTensor scratch;
  if (chain.packed.empty()) scratch = new_tensor({plan.packed_elements()}, dtype);
  return {conv, plan, chain.weights[i], panels<T>(plan, chain.weight(i, scratch)), chain.affines[i]};
}

// Large maps of a whole batch leave the caches between two convs, those of one image do not: each thread takes an image
// through the whole chain.
template <typename T>
Tensor image_by_image(const Chain& chain, const std::vector<Conv>& convs) {
  const ScalarType dtype = chain.x.scalar_type();
  const Activation in = check_activation(chain.x, "x"), at = convs[chain.length() - 1].output();
  std::vector<Step> steps;
  int64_t most = 0;  // elements between two convs
  for (int64_t i = 0; i < static_cast<int64_t>(convs.size()); ++i) {
    steps.push_back(step_of<T>(chain, i, convs[i]));
    if (i + 1 < chain.length()) most = std::max(most, steps.back().out_elements());
  }
  const Tensor y = new_activation({in.N, at.C, at.H, at.W}, dtype);
  require(!chain.projection || steps.back().out_elements() == at.numel(), "the projection does not give ", describe(y));
  if (chain.residual) check_like(*chain.residual, "residual", y, "the output");
  if (chain.identity) check_like(chain.x, "x", y, "the output");

  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), in.N);
  const Tensor buffers = new_tensor({workers, 2, most}, dtype);
  std::vector<ConvTable<T>> tables(workers);
  share_tasks(workers, in.N, [&](int64_t worker, int64_t image) {
    const auto run_step = [&](const Step& step, const T* from, const T* residual, bool relu, T* to) {
      ConvOperands<T> operands{from, const_data<T>(step.packed), to, fprop_view<T>(step.w)};
      operands.scale = const_data<T>(step.affine);
      operands.bias = operands.scale + step.conv.K;
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
  return chain.length() > 1 && in.H * in.W >= kPixels && shares_evenly;
}

// What one conv and its BN hold per channel; an absent vector has no elements.
struct Vectors {
  const Tensor &conv_bias, &gamma, &beta, &mean, &var;

  static Vectors of(const std::vector<Tensor>& all, int64_t conv) {
    const Tensor* const at = all.data() + 5 * conv;
    return {at[0], at[1], at[2], at[3], at[4]};
  }
};

// (2, K): what BN does to the conv's sums, scale and shift. In float64, for rounding once costs nothing here.
template <typename T>
Tensor affine_of(const Vectors& vectors, double eps, ScalarType dtype, int64_t K) {
  std::vector<Tensor> dense;  // keeps copies of vectors with gaps alive
  const auto read = [&](const Tensor& vector, const char* name) {
    if (vector.numel() == 0) return static_cast<const T*>(nullptr);
    dense.push_back(vector.is_contiguous() ? vector : torch::stable::contiguous(vector));
    check_tensor(dense.back(), name, dtype, {K});
    return const_data<T>(dense.back());
  };
  const T* const conv_bias = read(vectors.conv_bias, "conv bias");
  const T *const gamma = read(vectors.gamma, "BN weight"), *const beta = read(vectors.beta, "BN bias");
  const T *const mean = read(vectors.mean, "running_mean"), *const var = read(vectors.var, "running_var");
  const Tensor affine = new_tensor({2, K}, dtype);
  T* const scale = mutable_data<T>(affine);
  for (int64_t k = 0; k < K; ++k) {
    double factor = var == nullptr ? 1 : 1 / std::sqrt(var[k] + eps);
    if (gamma != nullptr) factor *= gamma[k];
    double shift = conv_bias == nullptr ? 0 : conv_bias[k];
    if (mean != nullptr) shift -= mean[k];
    shift *= factor;
    if (beta != nullptr) shift += beta[k];
    scale[k] = static_cast<T>(factor);
    scale[K + k] = static_cast<T>(shift);
  }
  return affine;
}

}  // namespace

Tensor eval_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, const std::vector<Tensor>& vectors, const Tensor& eps,
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu) {
  const int64_t count = weights.size();
  require(count > projection && (packed.empty() || packed.size() == weights.size()) &&
              vectors.size() == 5 * weights.size() && geometry.size() == 6 * weights.size(),
          "weights, packed, vectors and geometry do not go together");
  check_tensor(eps, "eps", ScalarType::Double, {count});
  Tensor y = x;
  for_conv_dtype(weights[0].scalar_type(), [&](auto element) {
    using T = decltype(element);
    std::vector<Tensor> affines;
    for (int64_t i = 0; i < count; ++i) {
      check_weight(weights[i]);
      affines.push_back(affine_of<T>(Vectors::of(vectors, i), const_data<double>(eps)[i], weights[0].scalar_type(),
                                     weights[i].size(0)));
    }
    const Chain chain{x, residual, weights, packed, affines, geometry, identity, projection, relu};
    const std::vector<Conv> convs = suits_image_by_image(chain) ? convs_of_image(chain) : std::vector<Conv>();
    // Convs that merge columns read padding that must be written out.
    const bool by_image = !convs.empty() && std::none_of(convs.begin(), convs.end(), merges_columns);
    y = by_image ? image_by_image<T>(chain, convs) : conv_by_conv<T>(chain);
  });
  return y;
}

}  // namespace fusedres::cpu
