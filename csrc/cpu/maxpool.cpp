// The native ops `bn_relu_maxpool` and `bn_relu_maxpool_backward`: the stem's tail.
#include "cpu/checks.h"
#include "cpu/factors.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace fusedres::cpu {
namespace {

constexpr int64_t kRunRows = 128;  // pixels added in the accumulation type before their sum enters a double

// Input (N, C, H, W), output (N, C, P, Q), square windows.
struct Pool {
  int64_t N, C, H, W, P, Q, kernel, stride, padding;
};

// Operands of the backward; dy and z of type T, bn (4, C) of acc_t<T>.
struct PoolBackward {
  Pool pool;
  const void *dy, *z, *bn;
  const uint8_t* tap;
};

}  // namespace
}  // namespace fusedres::cpu

#define FUSEDRES_KERNELS "cpu/maxpool_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

Pool check_pool(const Activation& z, int64_t kernel, int64_t stride, int64_t padding) {
  require(kernel >= 1 && kernel <= 16 && stride >= 1 && padding >= 0 && 2 * padding <= kernel, "kernel_size ", kernel,
          ", stride ", stride, ", padding ", padding,
          ": expected a kernel of 1 to 16, a positive stride and a padding of at most half the kernel");
  require(z.H + 2 * padding >= kernel && z.W + 2 * padding >= kernel, "a ", z.H, "x", z.W, " map with padding ",
          padding, " is smaller than the kernel of ", kernel);
  const auto out = [&](int64_t size) { return (size + 2 * padding - kernel) / stride + 1; };
  return {z.N, z.C, z.H, z.W, out(z.H), out(z.W), kernel, stride, padding};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& z, const Tensor& bn, int64_t kernel_size, int64_t stride,
                                           int64_t padding) {
  const Activation sizes = check_activation(z, "z");
  const ScalarType dtype = z.scalar_type();
  check_channels(bn, "bn", dtype, 4, sizes.C);
  const Pool pool = check_pool(sizes, kernel_size, stride, padding);
  const Activation out{pool.N, pool.C, pool.P, pool.Q};
  const Tensor y = new_activation(out, dtype), tap = new_activation(out, ScalarType::Byte);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = FUSEDRES_BEST_ISA(bn_relu_maxpool<T>);
    parallel_for_each(pool.N * pool.P, [&](int64_t line) {
      kernel(pool, const_data<T>(z), const_data<acc_t<T>>(bn), mutable_data<T>(y), mutable_data<uint8_t>(tap), line,
             line + 1);
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
  const Pool pool = check_pool(sizes, kernel_size, stride, padding);
  const Activation out{pool.N, pool.C, pool.P, pool.Q};
  check_channels_last(dy, "dy", dtype, out);
  check_channels_last(tap, "tap", ScalarType::Byte, out);
  const Tensor dz = new_activation(sizes, dtype), sums = new_tensor({2, sizes.C}, acc_dtype(dtype));
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    const PoolBackward op{pool, const_data<void>(dy), const_data<void>(z), const_data<void>(bn),
                          const_data<uint8_t>(tap)};
    const Chunks chunks = chunks_of(sizes.rows(), sizes.C * sizeof(T), kRunRows);
    std::vector<double> state(chunks.count() * 2 * sizes.C);
    const auto add_sums = FUSEDRES_BEST_ISA(maxpool_sums<T>);
    parallel_for_each(chunks.count(), [&](int64_t chunk) {
      std::vector<Acc> scratch(2 * sizes.C);
      add_sums(op, chunks.begin(chunk), chunks.end(chunk), state.data() + chunk * 2 * sizes.C, scratch.data());
    });
    const std::vector<double> totals = total(state, 2 * sizes.C);
    write_sums(totals.data(), totals.data() + sizes.C, const_data<Acc>(bn), sizes.C, mutable_data<Acc>(sums));
    const std::vector<Acc> factors = dbn_factors(const_data<Acc>(bn), const_data<Acc>(sums), sizes.C, inv_count);
    const auto write_dz = FUSEDRES_BEST_ISA(maxpool_dz<T>);
    parallel_for_each(chunks.count(), [&](int64_t chunk) {
      write_dz(op, factors.data(), mutable_data<T>(dz), chunks.begin(chunk), chunks.end(chunk));
    });
  });
  return {dz, sums};
}

}  // namespace fusedres::cpu
