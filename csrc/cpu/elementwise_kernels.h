// The tails without a reduction, for the rows of a block. Included per instruction set.

#include "cpu/prologue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// y = act(scale*z + shift + r) with r by `kResidual`: nothing, the residual, or scale_d*residual + shift_d.
template <typename T, Residual kResidual, bool kRelu>
void scale_shift_add_relu(const ForwardTail& tail, const Block& block) {
  using Acc = acc_t<T>;
  const int64_t channels = tail.channels;
  const auto* scale = static_cast<const Acc*>(tail.bn) + 2 * channels;
  const auto* residual_scale =
      kResidual == Residual::bn ? static_cast<const Acc*>(tail.residual_bn) + 2 * channels : nullptr;
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const T* z = static_cast<const T*>(tail.z) + row * channels;
    const T* residual = kResidual == Residual::none ? nullptr : static_cast<const T*>(tail.residual) + row * channels;
    T* y = static_cast<T*>(tail.y) + row * channels;
    for_each_vector<T>(channels, [=](auto lanes, int64_t c) {
      auto value = bn_apply(lanes.load(scale + c), lanes.load(z + c), lanes.load(scale + channels + c));
      if constexpr (kResidual == Residual::plain) value += lanes.load(residual + c);
      if constexpr (kResidual == Residual::bn) {
        value += bn_apply(lanes.load(residual_scale + c), lanes.load(residual + c),
                          lanes.load(residual_scale + channels + c));
      }
      if constexpr (kRelu) value = relu(value);
      lanes.store(y + c, value);
    });
  }
}

// dz = a*g + b*(z - mean) + c with factors (4, channels): a, b, c, mean.
template <typename T>
void dbn(const T* g_rows, const T* z_rows, const acc_t<T>* factors, int64_t channels, T* dz_rows, const Block& block) {
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const T* g = g_rows + row * channels;
    const T* z = z_rows + row * channels;
    T* dz = dz_rows + row * channels;
    for_each_vector<T>(channels, [=](auto lanes, int64_t c) {
      lanes.store(dz + c, dbn_apply(lanes, factors, channels, c, lanes.load(g + c), lanes.load(z + c)));
    });
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
