// The native op `head_fprop`: global average pool and fully connected layer.
#include <torch/csrc/stable/ops.h>

#include "cpu/conv.h"
#include "cpu/conv_checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/head_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

template <typename T>
void map_means(const T* x, const Activation& a, T* means) {
  constexpr int64_t kChannels = 64;  // of a task: a few lines of every pixel
  const Cut pieces = Cut::at_most(a.C, kChannels);
  const auto kernel = FUSEDRES_BEST_ISA(channel_means<T>);
  parallel_for_each(a.N * pieces.count, [&](int64_t task) {
    const int64_t image = task / pieces.count;
    kernel(x + image * a.H * a.W * a.C, a.H * a.W, a.C, pieces[task % pieces.count], means + image * a.C);
  });
}

// Of few images the layer is the reading of its weights: as they lie in memory, a row after the other.
constexpr int64_t kFewImages = 4;

template <typename T>
void rows_by_images(const Tensor& w, const T* bias, const T* means, int64_t images, T* y) {
  constexpr int64_t kFeatures = 64;  // of a task
  const int64_t features = w.size(0), depth = w.size(1);
  const Cut pieces = Cut::at_most(features, kFeatures);
  const auto kernel = FUSEDRES_BEST_ISA(head_rows<T>);
  parallel_for_each(pieces.count, [&](int64_t task) {
    kernel(const_data<T>(w), bias, means, images, depth, pieces[task], y, features);
  });
}

}  // namespace

Tensor head_fprop(const Tensor& x, const Tensor& w, const MaybeTensor& bias) {
  const Activation a = check_activation(x, "x");
  const ScalarType dtype = x.scalar_type();
  require(w.dim() == 2 && w.is_contiguous() && w.size(1) == a.C && w.scalar_type() == dtype, "x is ", describe(x),
          " and w is ", describe(w), ", expected one dtype and a contiguous (F, C)");
  const Tensor filter = torch::stable::view(w, {w.size(0), w.size(1), 1, 1});
  check_weight(filter);
  const Tensor means = new_activation({a.N, a.C, 1, 1}, dtype);
  if (bias) check_tensor(*bias, "bias", dtype, {w.size(0)});
  std::optional<Tensor> logits;
  for_conv_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    map_means(const_data<T>(x), a, mutable_data<T>(means));
    if (a.N > kFewImages) return;
    logits = new_tensor({a.N, w.size(0)}, dtype);
    rows_by_images(w, const_data<T>(bias), const_data<T>(means), a.N, mutable_data<T>(*logits));
  });
  if (logits) return *logits;
  const Tensor y = conv_fprop(means, filter, std::nullopt, bias, std::nullopt, {1, 1}, {0, 0}, {1, 1}, false);
  return torch::stable::flatten(y, 1);
}

}  // namespace fusedres::cpu
