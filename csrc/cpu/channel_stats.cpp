#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/channel_stats_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {

Tensor channel_stats(const Tensor& z) {
  constexpr int64_t kTileBytes = 128 << 10;  // within the second-level cache of one core
  constexpr int64_t kTileRows = 128;         // bounds the float runs
  constexpr int64_t kJoinedAtOnce = 128;     // channels
  const Activation sizes = check_activation(z, "z");
  const Tensor stats = new_tensor({3, sizes.C}, acc_dtype(z.scalar_type()));
  for_dtype(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t row_bytes = std::max<int64_t>(sizes.C * sizeof(T), 1);
    const int64_t tile_rows = std::clamp<int64_t>(kTileBytes / row_bytes, 1, kTileRows);
    const Chunks chunks = chunks_of(sizes.rows(), row_bytes, tile_rows);
    std::vector<double> state(chunks.count() * 2 * sizes.C);
    const auto chunk_stats = FUSEDRES_BEST_ISA(chunk_stats<T>);
    parallel_for_each(chunks.count(), [&](int64_t chunk) {
      std::vector<acc_t<T>> scratch(3 * sizes.C);
      double* mean = state.data() + chunk * 2 * sizes.C;
      chunk_stats(const_data<T>(z) + chunks.begin(chunk) * sizes.C, chunks.end(chunk) - chunks.begin(chunk), sizes.C,
                  tile_rows, mean, mean + sizes.C, scratch.data());
    });
    const auto join_stats = FUSEDRES_BEST_ISA(join_stats<acc_t<T>>);
    const Chunks joins{sizes.C, kJoinedAtOnce};
    parallel_for_each(joins.count(), [&](int64_t join) {
      join_stats(chunks, state.data(), sizes.C, joins.begin(join), joins.end(join), mutable_data<acc_t<T>>(stats));
    });
  });
  return stats;
}

}  // namespace fusedres::cpu
