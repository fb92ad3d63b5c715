// The native ops `eval_program` and `eval_network`: chains one behind another in one call.
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "cpu/eval_chain.h"

namespace fusedres::cpu {
namespace {

class Program {
 public:
  virtual ~Program() = default;
  virtual Tensor run(const Tensor& x) const = 0;
};

template <typename T>
class ProgramOf : public Program {
 public:
  ProgramOf(std::vector<EvalChain> chains, const Activation& in)
      : chains_(std::move(chains)), in_(in), threads_(torch::stable::get_num_threads()), planned_(plans()) {}

  Tensor run(const Tensor& x) const override {
    require(check_activation(x, "x") == in_ && x.scalar_type() == chains_[0].convs[0].w.scalar_type(), "x is ",
            describe(x), ", the program is for ", describe(in_), " in the dtype of its weights");
    const bool fits = threads_ == torch::stable::get_num_threads() &&
                      std::all_of(planned_.begin(), planned_.end(), [](const auto& chain) { return chain.fits(); });
    return fits ? run(x, planned_) : run(x, plans());
  }

 private:
  using Plans = std::vector<PlannedChain<T>>;

  Plans plans() const {
    Plans planned;
    planned.reserve(chains_.size());
    Activation at = in_;
    for (const EvalChain& chain : chains_) at = planned.emplace_back(chain, at).out();
    return planned;
  }

  static Tensor run(const Tensor& x, const Plans& planned) {
    const Tensor y = new_activation(planned.back().out(), x.scalar_type());
    EvalBuffers<T> buffers;
    Buffer<T> between[2];
    int64_t most = 0;
    for (const PlannedChain<T>& chain : planned) most = std::max(most, chain.out().numel());
    const T* from = const_data<T>(x);
    for (size_t i = 0; i < planned.size(); ++i) {
      T* const to = i + 1 < planned.size() ? between[i % 2].of({most}) : mutable_data<T>(y);
      planned[i].run(from, nullptr, to, buffers);
      from = to;
    }
    return y;
  }

  const std::vector<EvalChain> chains_;
  const Activation in_;
  const int64_t threads_;
  const Plans planned_;
};

// What the tensor that stands for a program holds. It knows its place, for a copy would not keep the program alive.
struct Handle {
  const Handle* self;
  std::unique_ptr<const Program> program;
};

constexpr int64_t kHandleBytes = sizeof(Handle);

Tensor handle_of(std::unique_ptr<const Program> program) {
  auto* const handle = new Handle{nullptr, std::move(program)};
  handle->self = handle;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(handle, {kHandleBytes}, {1}, cpu, ScalarType::Byte,
                                  [handle](void*) { delete handle; });
}

const Program& program_of(const Tensor& tensor) {
  check_tensor(tensor, "program", ScalarType::Byte, {kHandleBytes});
  const auto* const handle = const_data<Handle>(tensor);
  const bool is_aligned = reinterpret_cast<uintptr_t>(handle) % alignof(Handle) == 0;
  require(is_aligned && handle->self == handle, "program is none that eval_program made");
  return *handle->program;
}

}  // namespace

Tensor eval_program(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                    const std::vector<Tensor>& vectors, const Tensor& eps, const std::vector<int64_t>& geometry,
                    const std::vector<int64_t>& forms, const std::vector<int64_t>& input_size) {
  const EvalArguments arguments{weights, packed, vectors, eps, geometry};
  arguments.check();
  constexpr size_t kForm = 7;
  require(input_size.size() == 4 && input_size[0] >= 0, "input_size is not (N, C, H, W)");
  bytes_of(input_size, sizeof(double));
  require(!forms.empty() && forms.size() % kForm == 0, "forms are not ", kForm, " integers of each chain");
  std::vector<EvalChain> chains;
  int64_t first = 0;
  for (size_t i = 0; i < forms.size(); i += kForm) {
    const int64_t* const form = forms.data() + i;
    const bool identity = form[1], projection = form[2], relu = form[3];
    const int64_t count = form[0];
    require(count > projection && count <= static_cast<int64_t>(weights.size()) - first, "a chain of ", count,
            " convs");
    const auto pool = form[4] == 0 ? std::nullopt : std::optional(PoolWindow{form[4], form[5], form[6]});
    chains.push_back({arguments.convs(first, count), identity, projection, relu, pool});
    first += count;
  }
  check_weight(weights[0]);
  const Activation in{input_size[0], input_size[1], input_size[2], input_size[3]};
  Tensor handle = eps;
  for_conv_dtype(weights[0].scalar_type(), [&](auto element) {
    handle = handle_of(std::make_unique<ProgramOf<decltype(element)>>(std::move(chains), in));
  });
  return handle;
}

Tensor eval_network(const Tensor& x, const Tensor& program) { return program_of(program).run(x); }

}  // namespace fusedres::cpu
