// The native CUDA op `channel_stats`.
#include "cuda/channel_stats.h"
#include "cuda/ops.h"
#include "cuda/tail_checks.h"

namespace fusedres::cuda {

Tensor channel_stats(const Tensor& z) {
  const TailTensors tensors(z, "z");
  const Launcher launcher(z);
  const int C = tensors.C();
  const Tensor stats = tensors.new_vectors({3, C});
  for_any_dtype(tensors.dtype(), [&](auto element) {
    using T = decltype(element);
    const Tensor parts = tensors.new_vectors({channel_stats_parts<T>(tensors.rows(), C), 3, C});
    const ChannelStatsProblem<T> problem{data<T>(z), mutable_data<float>(parts), mutable_data<float>(stats),
                                         tensors.rows(), C};
    channel_stats(problem, launcher);
  });
  return stats;
}

}  // namespace fusedres::cuda
