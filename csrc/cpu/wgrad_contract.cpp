#include "cpu/wgrad_contract.h"

#include <torch/csrc/stable/ops.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/wgrad_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
template <typename T, typename Tile, typename Out>
void contract_pixels(const WgradProblem& problem, const WgradOperand<T>& g, const WgradOperand<T>& x, Out* dw) {
  const auto accumulate = FUSEDRES_BEST_ISA(wgrad_accumulate<T, Tile>);
  const auto write = FUSEDRES_BEST_ISA(wgrad_write<T, Tile, Out>);
  if (problem.K == 0 || problem.C == 0) return;  // of no channels there is nothing to write, and no tile
  const WgradPlan plan(problem);
  const WgradBuffers sizes = FUSEDRES_BEST_ISA(wgrad_buffers<T>)(plan);
  const int64_t tiles = plan.tiles(), chunks = plan.chunks(), tasks = tiles * chunks;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const bool is_whole = chunks == 1;  // a task's tile is final, and is written at once
  Buffer<acc_t<T>> sides;
  Buffer<Tile> sums;
  acc_t<T>* const packed = sides.of({workers, sizes.row_side + sizes.vector_side});
  Tile* const partial = sums.of({is_whole ? workers : tasks, sizes.tile});

  share_tasks(workers, tasks, [&](int64_t worker, int64_t task) {
    const int64_t tile_index = task % tiles;
    if (plan.skips(tile_index)) return;
    acc_t<T>* row_side = packed + worker * (sizes.row_side + sizes.vector_side);
    Tile* tile = partial + (is_whole ? worker : task) * sizes.tile;
    accumulate(plan, g, x, tile_index, task / tiles, row_side, row_side + sizes.row_side, tile);
    for (int64_t panel = 0; is_whole && panel < sizes.row_panels; ++panel) {
      write(plan, tile_index, panel, {tile, 1, 0}, dw);
    }
  });
  if (is_whole) return;
  parallel_for_each(tiles * sizes.row_panels, [&](int64_t item) {
    const int64_t tile_index = item / sizes.row_panels;
    if (plan.skips(tile_index)) return;
    const WgradPartials<Tile> partials{partial + tile_index * sizes.tile, chunks, tiles * sizes.tile};
    write(plan, tile_index, item % sizes.row_panels, partials, dw);
  });
}

#define FUSEDRES_CONTRACT_PIXELS(T, Tile, Out)                                                                     \
  template void contract_pixels<T, Tile, Out>(const WgradProblem&, const WgradOperand<T>&, const WgradOperand<T>&, \
                                              Out*);
FUSEDRES_CONTRACT_PIXELS(double, double, double)
FUSEDRES_CONTRACT_PIXELS(float, float, float)
FUSEDRES_CONTRACT_PIXELS(float, double, float)
FUSEDRES_CONTRACT_PIXELS(BFloat16, float, BFloat16)
FUSEDRES_CONTRACT_PIXELS(BFloat16, double, float)
FUSEDRES_CONTRACT_PIXELS(Float16, float, Float16)
FUSEDRES_CONTRACT_PIXELS(Float16, double, float)

}  // namespace fusedres::cpu
