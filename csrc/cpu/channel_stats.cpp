// The native op `channel_stats`.
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/channel_stats_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {

Tensor channel_stats(const Tensor& z) {
  constexpr int64_t kTileBytes = 128 << 10;  // within the second-level cache of one core
  constexpr int64_t kTileRows = 128;         // bounds the runs added in float
  constexpr int64_t kJoinedAtOnce = 128;     // channels
  const Activation sizes = check_activation(z, "z");
  const Tensor stats = new_tensor({3, sizes.C}, acc_dtype(z.scalar_type()));
  for_dtype(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Blocks blocks = reduction_blocks(sizes.rows(), sizes.C, sizeof(T));
    const int64_t tile_rows = std::clamp<int64_t>(kTileBytes / (blocks.block_width * sizeof(T)), 1, kTileRows);
    std::vector<double> state(blocks.down() * 2 * sizes.C);
    const auto kernel = FUSEDRES_BEST_ISA(block_stats<T>);
    parallel_for_each(blocks.count(), [&](int64_t i) {
      const Block block = blocks[i];
      std::vector<acc_t<T>> scratch(3 * block.width);
      double* mean = state.data() + i / blocks.across() * 2 * sizes.C + block.channel;
      kernel(const_data<T>(z), sizes.C, block, tile_rows, mean, mean + sizes.C, scratch.data());
    });
    const auto join = FUSEDRES_BEST_ISA(join_stats<acc_t<T>>);
    parallel_for_each((sizes.C + kJoinedAtOnce - 1) / kJoinedAtOnce, [&](int64_t i) {
      const int64_t begin = i * kJoinedAtOnce, end = std::min(sizes.C, begin + kJoinedAtOnce);
      join(blocks, state.data(), begin, end, mutable_data<acc_t<T>>(stats));
    });
  });
  return stats;
}

}  // namespace fusedres::cpu
