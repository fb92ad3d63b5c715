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

// Few pixels leave a panel of weights no time to arrive, few images leave threads without work. Convs that merge columns
// read padding that must be written out.
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
    convs.push_back({weights[i], {}, v[0], v[1], v[2], v[3], v[4], const_data<double>(eps)[i],
                     {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}});
    if (!packed.empty()) convs.back().packed = packed[i];
  }
  return convs;
}

template <typename T>
ReadyChain<T>::ReadyChain(const EvalChain& chain, const Activation& in) : chain_(chain), in_(in) {
  std::vector<Conv> convs = convs_of(chain, in);
  out_ = convs[chain.length() - 1].output();
  pooled_ = chain.pool ? chain.pool->output(out_) : out_;
  is_by_image_ = suits_image_by_image(convs, chain.length(), in);
  for (int64_t i = 0; i < static_cast<int64_t>(convs.size()); ++i) {
    const EvalConv& conv = chain.convs[i];
    affines_.push_back(affine_of<T>(conv));
    const T* const shift = affines_.back().data() + affines_.back().size() - convs[i].K;
    const T* const scale = shift == affines_.back().data() ? nullptr : affines_.back().data();
    if (is_by_image_) {
      convs[i].N = 1;
      convs_.push_back({convs[i], fprop_plan<T>(convs[i], 1, Weights::kPacked), conv.w, conv.packed, scale, shift});
    } else {
      convs_.push_back(planned(convs[i], conv.w, conv.packed, scale, shift));
    }
  }
}

template <typename T>
Tensor ReadyChain<T>::run(const Tensor& x, const MaybeTensor& residual, ConvBuffers<T>& buffers) const {
  const Tensor y = is_by_image_ ? image_by_image(x, residual, buffers) : conv_by_conv(x, residual, buffers);
  return chain_.pool ? maxpool(y, *chain_.pool) : y;
}

// One conv after the other, each on all threads.
template <typename T>
Tensor ReadyChain<T>::conv_by_conv(const Tensor& x, const MaybeTensor& residual, ConvBuffers<T>& buffers) const {
  const int64_t last = chain_.length() - 1;
  MaybeTensor shortcut = residual;
  if (chain_.identity) shortcut = x;
  if (chain_.projection) shortcut = fusedres::cpu::run(convs_.back(), x, std::nullopt, false, buffers);
  Tensor a = x;
  for (int64_t i = 0; i < last; ++i) a = fusedres::cpu::run(convs_[i], a, std::nullopt, true, buffers);
  return fusedres::cpu::run(convs_[last], a, shortcut, chain_.relu, buffers);
}

// Large maps of a whole batch leave the caches between two convs, those of one image do not: each thread takes an image
// through the whole chain.
template <typename T>
Tensor ReadyChain<T>::image_by_image(const Tensor& x, const MaybeTensor& residual, ConvBuffers<T>& buffers) const {
  const ScalarType dtype = x.scalar_type();
  const int64_t last = chain_.length() - 1;
  const Tensor y = new_activation(out_, dtype);
  const int64_t image_elements = out_.H * out_.W * out_.C;
  require(!chain_.projection || convs_.back().conv.output().numel() == image_elements, "the projection does not give ",
          describe(y));
  if (residual) check_like(*residual, "residual", y, "the output");
  if (chain_.identity) check_like(x, "x", y, "the output");

  std::vector<Tensor> weights;
  int64_t most = 0;  // elements between two convs
  for (int64_t i = 0; i < static_cast<int64_t>(convs_.size()); ++i) {
    weights.push_back(panels<T>(convs_[i].plan, convs_[i].w, convs_[i].packed, std::nullopt));
    if (i < last) most = std::max(most, convs_[i].conv.output().numel());
  }
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), in_.N);
  const Tensor between = new_tensor({workers, 2, most}, dtype);
  buffers.tables.resize(std::max<size_t>(buffers.tables.size(), workers));
  share_tasks(workers, in_.N, [&](int64_t worker, int64_t image) {
    const auto run_conv = [&](int64_t i, const T* from, const T* shortcut, bool relu, T* to) {
      const PlannedConv<T>& planned = convs_[i];
      ConvOperands<T> operands{from, const_data<T>(weights[i]), to, fprop_view<T>(planned.w)};
      operands.scale = planned.scale;
      operands.bias = planned.shift;
      operands.residual = shortcut;
      operands.relu = relu;
      run_alone(planned.plan, operands, buffers.tables[worker]);
    };
    const T* const image_x = const_data<T>(x) + image * in_.C * in_.H * in_.W;
    T* const out = mutable_data<T>(y) + image * image_elements;
    T* const maps = mutable_data<T>(between) + worker * 2 * most;
    const T* shortcut = chain_.identity ? image_x
                        : residual      ? const_data<T>(residual) + image * image_elements
                                        : nullptr;
    if (chain_.projection) {
      run_conv(last + 1, image_x, nullptr, false, out);
      shortcut = out;  // read where the last conv then writes
    }
    const T* from = image_x;
    for (int64_t i = 0; i < last; ++i) {
      T* const to = maps + i % 2 * most;
      run_conv(i, from, nullptr, true, to);
      from = to;
    }
    run_conv(last, from, shortcut, chain_.relu, out);
  });
  return y;
}

template class ReadyChain<float>;
template class ReadyChain<double>;

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
  Tensor y = x;
  for_conv_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    ConvBuffers<T> buffers;
    y = ReadyChain<T>(chain, in).run(x, residual, buffers);
  });
  return y;
}

}  // namespace fusedres::cpu
