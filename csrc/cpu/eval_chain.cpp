// The native op `eval_chain`: a whole chain with constant BN, image by image where its maps are large.
#include "cpu/eval_chain.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fusedres::cpu {
namespace {

constexpr int64_t kVectors = 5, kSizes = 6;

// Every conv of the chain on inputs of these sizes.
std::vector<Conv> convs_of(const EvalChain& chain, const Activation& in) {
  std::vector<Conv> convs;
  Activation at = in;
  for (int64_t i = 0; i < static_cast<int64_t>(chain.convs.size()); ++i) {
    if (i == chain.length()) at = in;
    const EvalConv& conv = chain.convs[i];
    check_weight(conv.w);
    convs.push_back(check_conv(conv.w, at, chain.convs[0].w.scalar_type(), conv.stride, conv.padding, conv.dilation));
    at = convs.back().output();
  }
  return convs;
}

// Few pixels leave a panel of weights no time to arrive, few images leave threads without work. Convs that merge
// columns read padding that must be written out.
bool suits_image_by_image(const std::vector<Conv>& convs, int64_t length, const Activation& in) {
  constexpr int64_t kPixels = 600;
  const int64_t workers = torch::stable::get_num_threads();
  const bool shares_evenly = in.N % workers == 0 || in.N >= 4 * workers;
  return length > 1 && in.H * in.W >= kPixels && shares_evenly &&
         std::none_of(convs.begin(), convs.end(), merges_columns);
}

// What BN does to the conv's sums: their scale, where there is one, and shift. In float64, for rounding once costs
// nothing here.
template <typename T>
std::vector<T> affine_of(const EvalConv& conv) {
  const int64_t K = conv.w.size(0);
  std::vector<Tensor> dense;  // keeps copies of vectors with gaps alive
  const auto read = [&](const Tensor& vector, const char* name) {
    if (vector.numel() == 0) return static_cast<const T*>(nullptr);
    dense.push_back(vector.is_contiguous() ? vector : torch::stable::contiguous(vector));
    check_tensor(dense.back(), name, conv.w.scalar_type(), {K});
    return const_data<T>(dense.back());
  };
  const T* const bias = read(conv.bias, "conv bias");
  const T *const gamma = read(conv.gamma, "BN weight"), *const beta = read(conv.beta, "BN bias");
  const T *const mean = read(conv.mean, "running_mean"), *const var = read(conv.var, "running_var");
  const bool scales = gamma != nullptr || var != nullptr;
  std::vector<T> affine((scales + 1) * K);
  T* const shifts = affine.data() + scales * K;
  for (int64_t k = 0; k < K; ++k) {
    double scale = var == nullptr ? 1 : 1 / std::sqrt(var[k] + conv.eps);
    if (gamma != nullptr) scale *= gamma[k];
    double shift = bias == nullptr ? 0 : bias[k];
    if (mean != nullptr) shift -= mean[k];
    shift *= scale;
    if (beta != nullptr) shift += beta[k];
    if (scales) affine[k] = static_cast<T>(scale);
    shifts[k] = static_cast<T>(shift);
  }
  return affine;
}

}  // namespace

void EvalArguments::check() const {
  const size_t count = weights.size();
  require((packed.empty() || packed.size() == count) && vectors.size() == kVectors * count &&
              geometry.size() == kSizes * count,
          "weights, packed, vectors and geometry do not go together");
  check_tensor(eps, "eps", ScalarType::Double, {static_cast<int64_t>(count)});
}

std::vector<EvalConv> EvalArguments::convs(int64_t first, int64_t count) const {
  std::vector<EvalConv> convs;
  for (int64_t i = first; i < first + count; ++i) {
    const Tensor* const v = vectors.data() + kVectors * i;
    const int64_t* const g = geometry.data() + kSizes * i;
    convs.push_back({.w = weights[i],
                     .bias = v[0],
                     .gamma = v[1],
                     .beta = v[2],
                     .mean = v[3],
                     .var = v[4],
                     .eps = const_data<double>(eps)[i],
                     .stride = {g[0], g[1]},
                     .padding = {g[2], g[3]},
                     .dilation = {g[4], g[5]}});
    if (!packed.empty()) convs.back().packed = packed[i];
  }
  return convs;
}

template <typename T>
PlannedChain<T>::PlannedChain(const EvalChain& chain, const Activation& in) : chain_(chain), in_(in) {
  std::vector<Conv> convs = convs_of(chain, in);
  convs_out_ = convs[chain.length() - 1].output();
  out_ = chain.pool ? chain.pool->output(convs_out_) : convs_out_;
  require(!chain.identity || in == convs_out_, "the input ", describe(in), " is no shortcut for ",
          describe(convs_out_));
  require(!chain.projection || convs.back().output() == convs_out_, "the projection gives ",
          describe(convs.back().output()), ", expected ", describe(convs_out_));
  is_by_image_ = suits_image_by_image(convs, chain.length(), in);
  bool is_final = true;
  for (int64_t i = 0; i < static_cast<int64_t>(convs.size()); ++i) {
    const EvalConv& conv = chain.convs[i];
    const WeightStrides strides = fprop_strides(conv.w);
    const bool is_packed = conv.packed.has_value();
    if (is_by_image_) {
      convs[i].N = 1;
      convs_.emplace_back(convs[i], fprop_plan<T>(convs[i], 1, Weights::kPacked), strides, is_packed);
    } else {
      convs_.push_back(planned<T>(convs[i], strides, is_packed));
    }
    is_final = is_final && is_packed;
  }
  if (is_final) final_ = read();
}

template <typename T>
bool PlannedChain<T>::fits() const {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  for (size_t i = 0; i < convs_.size(); ++i) {
    const Tensor& w = chain_.convs[i].w;
    const Conv& conv = convs_[i].conv;
    const bool is_same = is_readable(w) && w.dim() == 4 && w.scalar_type() == dtype && w.size(0) == conv.K &&
                         w.size(1) == conv.C && w.size(2) == conv.axes.h.kernel && w.size(3) == conv.axes.w.kernel;
    if (!is_same || fprop_strides(w) != convs_[i].strides) return false;
  }
  return true;
}

template <typename T>
typename PlannedChain<T>::Values PlannedChain<T>::read() const {
  Values values;
  for (size_t i = 0; i < convs_.size(); ++i) {
    const EvalConv& conv = chain_.convs[i];
    const std::vector<T>& affine = values.affines.emplace_back(affine_of<T>(conv));
    const T* const shift = affine.data() + affine.size() - convs_[i].conv.K;
    const T* const scale = shift == affine.data() ? nullptr : affine.data();
    values.convs.push_back(values_of(convs_[i], conv.w, conv.packed, scale, shift));
  }
  return values;
}

template <typename T>
void PlannedChain<T>::run(const T* x, const T* residual, T* y, EvalBuffers<T>& buffers) const {
  std::optional<Values> now;
  if (!final_) now = read();
  const Values& values = final_ ? *final_ : *now;
  Buffer<T> unpooled;
  T* const to = chain_.pool ? unpooled.of({convs_out_.numel()}) : y;
  if (is_by_image_) {
    image_by_image(values, x, residual, to, buffers);
  } else {
    conv_by_conv(values, x, residual, to, buffers);
  }
  if (chain_.pool) maxpool(to, convs_out_, *chain_.pool, y);
}

template <typename T>
int64_t PlannedChain<T>::most_between() const {
  int64_t most = 0;
  for (int64_t i = 0; i + 1 < chain_.length(); ++i) most = std::max(most, convs_[i].conv.output().numel());
  return most;
}

// One conv after the other, each on all threads.
template <typename T>
void PlannedChain<T>::conv_by_conv(const Values& values, const T* x, const T* residual, T* y,
                                   EvalBuffers<T>& buffers) const {
  const auto run_conv = [&](int64_t i, const T* from, const T* shortcut, bool relu, T* to) {
    fusedres::cpu::run(convs_[i], values.convs[i], from, shortcut, relu, to, buffers.conv);
  };
  const int64_t last = chain_.length() - 1, most = most_between();
  const T* shortcut = chain_.identity ? x : residual;
  if (chain_.projection) {
    run_conv(last + 1, x, nullptr, false, y);
    shortcut = y;  // read where the last conv then writes
  }
  const T* from = x;
  for (int64_t i = 0; i < last; ++i) {
    T* const to = buffers.between[i % 2].of({most});
    run_conv(i, from, nullptr, true, to);
    from = to;
  }
  run_conv(last, from, shortcut, chain_.relu, y);
}

// Large maps of a whole batch leave the caches between two convs, those of one image do not: each thread takes an image
// through the whole chain.
template <typename T>
void PlannedChain<T>::image_by_image(const Values& values, const T* x, const T* residual, T* y,
                                     EvalBuffers<T>& buffers) const {
  const int64_t last = chain_.length() - 1, most = most_between();
  const int64_t in_elements = in_.H * in_.W * in_.C, out_elements = convs_out_.H * convs_out_.W * convs_out_.C;
  std::vector<Buffer<T>> made(convs_.size());
  std::vector<const T*> weights;
  for (size_t i = 0; i < convs_.size(); ++i) weights.push_back(panels(convs_[i], values.convs[i], made[i]));
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), in_.N);
  T* const between = buffers.between[0].of({workers, 2, most});
  std::vector<ConvTable<T>>& tables = buffers.conv.tables;
  tables.resize(std::max<size_t>(tables.size(), workers));
  share_tasks(workers, in_.N, [&](int64_t worker, int64_t image) {
    const auto run_conv = [&](int64_t i, const T* from, const T* shortcut, bool relu, T* to) {
      ConvOperands<T> operands = operands_of(convs_[i], values.convs[i], from, shortcut, relu, to);
      operands.packed = weights[i];
      run_alone(convs_[i].plan, operands, tables[worker]);
    };
    const T* const image_x = x + image * in_elements;
    T* const out = y + image * out_elements;
    const T* shortcut = chain_.identity ? image_x : residual == nullptr ? nullptr : residual + image * out_elements;
    if (chain_.projection) {
      run_conv(last + 1, image_x, nullptr, false, out);
      shortcut = out;  // read where the last conv then writes
    }
    const T* from = image_x;
    for (int64_t i = 0; i < last; ++i) {
      T* const to = between + (worker * 2 + i % 2) * most;
      run_conv(i, from, nullptr, true, to);
      from = to;
    }
    run_conv(last, from, shortcut, chain_.relu, out);
  });
}

template class PlannedChain<float>;
template class PlannedChain<double>;

Tensor eval_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, const std::vector<Tensor>& vectors, const Tensor& eps,
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu,
                  const std::vector<int64_t>& pool) {
  const EvalArguments arguments{weights, packed, vectors, eps, geometry};
  arguments.check();
  const int64_t count = weights.size();
  require(count > projection, "a chain without convs");
  const EvalChain chain{arguments.convs(0, count), identity, projection, relu, PoolWindow::of(pool)};
  const Activation in = check_activation(x, "x");
  check_weight(weights[0]);
  require(x.scalar_type() == weights[0].scalar_type(), "x is ", describe(x), ", the first weight ",
          describe(weights[0]), ", expected one dtype");
  MaybeTensor y;
  for_conv_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const PlannedChain<T> planned(chain, in);
    if (residual) check_channels_last(*residual, "residual", x.scalar_type(), planned.convs_out());
    y = new_activation(planned.out(), x.scalar_type());
    EvalBuffers<T> buffers;
    planned.run(const_data<T>(x), const_data<T>(residual), mutable_data<T>(*y), buffers);
  });
  return *y;
}

}  // namespace fusedres::cpu
