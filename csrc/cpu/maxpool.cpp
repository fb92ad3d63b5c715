// The native ops `bn_relu_maxpool` and `bn_relu_maxpool_backward`, the stem's tail, and the pool of a chain in eval.
#include "cpu/maxpool.h"

#include "cpu/factors.h"
#include "cpu/geometry.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace fusedres::cpu {
namespace {

// Input (N, C, H, W), output (N, C, P, Q), square windows.
struct Pool {
  int64_t N, C, H, W, P, Q, kernel, stride, padding;

  Activation output() const { return {N, C, P, Q}; }
};

// Operands of the backward; dy and z of type T, bn (4, C) of acc_t<T>; which windows hold an input row or column.
struct PoolBackward {
  Pool pool;
  const void *dy, *z, *bn;
  const uint8_t* tap;
  const Range *row_windows, *column_windows;
};

}  // namespace
}  // namespace fusedres::cpu

#define FUSEDRES_KERNELS "cpu/maxpool_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

Pool pool_of(const Activation& in, const PoolWindow& window) {
  const Activation out = window.output(in);
  return {in.N, in.C, in.H, in.W, out.H, out.W, window.kernel, window.stride, window.padding};
}

// For every index of an input axis, the windows that hold it: window o covers o*stride - padding + [0, kernel).
std::vector<Range> windows_of(int64_t size, int64_t out, const Pool& pool) {
  std::vector<Range> windows(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = i + pool.padding;
    const int64_t first = at < pool.kernel ? 0 : (at - pool.kernel) / pool.stride + 1;
    windows[i] = {first, std::min(out, at / pool.stride + 1)};
  }
  return windows;
}

}  // namespace

std::optional<PoolWindow> PoolWindow::of(const std::vector<int64_t>& sizes) {
  if (sizes.empty()) return {};
  require(sizes.size() == 3, "a pool of ", sizes.size(), " integers, expected kernel_size, stride and padding");
  return PoolWindow{sizes[0], sizes[1], sizes[2]};
}

Activation PoolWindow::output(const Activation& in) const {
  require(kernel >= 1 && kernel <= 16 && stride >= 1 && padding >= 0 && 2 * padding <= kernel, "kernel_size ", kernel,
          ", stride ", stride, ", padding ", padding,
          ": expected a kernel of 1 to 16, a positive stride and a padding of at most half the kernel");
  require(in.H + 2 * padding >= kernel && in.W + 2 * padding >= kernel, "a ", in.H, "x", in.W, " map with padding ",
          padding, " is smaller than the kernel of ", kernel);
  const auto out = [&](int64_t size) { return (size + 2 * padding - kernel) / stride + 1; };
  return {in.N, in.C, out(in.H), out(in.W)};
}

template <typename T>
void maxpool(const T* x, const Activation& in, const PoolWindow& window, T* y) {
  const Pool pool = pool_of(in, window);
  const auto kernel = FUSEDRES_BEST_ISA(maxpool<T>);
  const Blocks blocks = row_blocks(pool.N * pool.P, pool.Q * pool.C, sizeof(T));
  parallel_for_each(blocks.count(), [&](int64_t i) { kernel(pool, x, y, blocks[i]); });
}
template void maxpool<float>(const float*, const Activation&, const PoolWindow&, float*);
template void maxpool<double>(const double*, const Activation&, const PoolWindow&, double*);

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& z, const Tensor& bn, int64_t kernel_size, int64_t stride,
                                           int64_t padding) {
  const Activation sizes = check_activation(z, "z");
  const ScalarType dtype = z.scalar_type();
  check_channels(bn, "bn", dtype, 4, sizes.C);
  const Pool pool = pool_of(sizes, {kernel_size, stride, padding});
  const Activation out = pool.output();
  const Tensor y = new_activation(out, dtype), tap = new_activation(out, ScalarType::Byte);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = FUSEDRES_BEST_ISA(bn_relu_maxpool<T>);
    const Blocks blocks = row_blocks(pool.N * pool.P, pool.Q * pool.C, sizeof(T));
    parallel_for_each(blocks.count(), [&](int64_t i) {
      kernel(pool, const_data<T>(z), const_data<acc_t<T>>(bn), mutable_data<T>(y), mutable_data<uint8_t>(tap),
             blocks[i]);
    });
  });
  return {y, tap};
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward(const Tensor& dy, const Tensor& tap, const Tensor& z,
                                                    const Tensor& bn, int64_t kernel_size, int64_t stride,
                                                    int64_t padding, double inv_count) {
  const Activation sizes = check_activation(z, "z");
  const ScalarType dtype = z.scalar_type();
  check_channels(bn, "bn", dtype, 4, sizes.C);
  const Pool pool = pool_of(sizes, {kernel_size, stride, padding});
  const Activation out = pool.output();
  check_channels_last(dy, "dy", dtype, out);
  check_channels_last(tap, "tap", ScalarType::Byte, out);
  const Tensor dz = new_activation(sizes, dtype), sums = new_tensor({2, sizes.C}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    const std::vector<Range> rows = windows_of(pool.H, pool.P, pool), columns = windows_of(pool.W, pool.Q, pool);
    const PoolBackward op{
        pool,        const_data<void>(dy), const_data<void>(z), const_data<void>(bn), const_data<uint8_t>(tap),
        rows.data(), columns.data()};
    const auto sums_kernel = FUSEDRES_BEST_ISA(maxpool_sums<T>);
    const std::vector<double> totals =
        reduce<Acc>(reduction_blocks(sizes.rows(), sizes.C, sizeof(T)), 2,
                    [&](const Block& block, double* state, Acc* scratch) { sums_kernel(op, block, state, scratch); });
    write_sums(totals.data(), totals.data() + sizes.C, const_data<Acc>(bn), sizes.C, mutable_data<Acc>(sums));
    const std::vector<Acc> factors = dbn_factors(const_data<Acc>(bn), const_data<Acc>(sums), sizes.C, inv_count);
    const auto dz_kernel = FUSEDRES_BEST_ISA(maxpool_dz<T>);
    const Blocks blocks = row_blocks(sizes.rows(), sizes.C, sizeof(T));
    parallel_for_each(blocks.count(),
                      [&](int64_t i) { dz_kernel(op, factors.data(), mutable_data<T>(dz), blocks[i]); });
  });
  return {dz, sums};
}

}  // namespace fusedres::cpu
