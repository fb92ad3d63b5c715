// Chains with constant BN: described as the ops are given them, and made ready for inputs of one size.
#pragma once

#include "cpu/conv.h"
#include "cpu/maxpool.h"

namespace fusedres::cpu {

Tensor eval_chain(const Tensor& x, const MaybeTensor& residual, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, const std::vector<Tensor>& vectors, const Tensor& eps,
                  const std::vector<int64_t>& geometry, bool identity, bool projection, bool relu,
                  const std::vector<int64_t>& pool);

Tensor eval_program(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                    const std::vector<Tensor>& vectors, const Tensor& eps, const std::vector<int64_t>& geometry,
                    const std::vector<int64_t>& forms, const std::vector<int64_t>& input_size);

Tensor eval_network(const Tensor& x, const Tensor& program);

// A conv and its BN. A vector that is absent has no elements.
struct EvalConv {
  Tensor w;
  MaybeTensor packed;
  Tensor bias, gamma, beta, mean, var;
  double eps;
  std::vector<int64_t> stride, padding, dilation;
};

struct EvalChain {
  std::vector<EvalConv> convs;  // one behind another, then a projection's
  bool identity, projection, relu;
  std::optional<PoolWindow> pool;

  int64_t length() const { return static_cast<int64_t>(convs.size()) - projection; }
};

// The convs in the arguments of an op: of each five vectors and six integers (stride, padding and dilation), and its
// packed weight or none of any.
struct EvalArguments {
  const std::vector<Tensor>&weights, &packed, &vectors;
  const Tensor& eps;
  const std::vector<int64_t>& geometry;

  // Throws where they do not go together.
  void check() const;
  // Those [first, first + count).
  std::vector<EvalConv> convs(int64_t first, int64_t count) const;
};

// What chains that run one after another hand on.
template <typename T>
struct EvalBuffers {
  ConvBuffers<T> conv;
  Buffer<T> between[2];  // outputs of convs that others read
};

// A chain planned for inputs of one size.
template <typename T>
class PlannedChain {
 public:
  // `chain` must live as long, and in its place. Packed weights and the vectors beside them are taken as final; what is
  // not packed is read at every run.
  PlannedChain(const EvalChain& chain, const Activation& in);

  // What the convs give, as a residual must be, and what comes out behind the pool.
  const Activation& convs_out() const { return convs_out_; }
  const Activation& out() const { return out_; }

  // Whether the weights still are as the plan takes them.
  bool fits() const;

  // All dense channels_last: x of those sizes, a residual or null, y.
  void run(const T* x, const T* residual, T* y, EvalBuffers<T>& buffers) const;

 private:
  struct Values {
    std::vector<std::vector<T>> affines;  // scale and shift of each conv: (2, K), or (1, K) without a scale
    std::vector<ConvValues<T>> convs;
  };

  // What the tensors hold now.
  Values read() const;
  void conv_by_conv(const Values& values, const T* x, const T* residual, T* y, EvalBuffers<T>& buffers) const;
  void image_by_image(const Values& values, const T* x, const T* residual, T* y, EvalBuffers<T>& buffers) const;
  // The largest output between two convs.
  int64_t most_between() const;

  const EvalChain& chain_;
  Activation in_, convs_out_, out_;
  bool is_by_image_;
  std::vector<PlannedConv> convs_;
  std::optional<Values> final_;
};

}  // namespace fusedres::cpu
