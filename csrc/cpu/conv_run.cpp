#include "cpu/conv_run.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"

#define FUSEDRES_KERNELS "cpu/conv_kernels.h"
#include "cpu/foreach_isa.h"

namespace fusedres::cpu {
namespace {

// That of the best instruction set, for a conv to so many channels. Where they fill no more than half of a panel of
// 64-byte vectors, the other half would be multiplied for nothing.
template <typename T>
ConvTile conv_tile_for(int64_t channels) {
  const Isa narrower = std::min(best_isa(), Isa::avx2);
  const ConvTile narrow = FUSEDRES_OF_ISA(narrower, conv_tile<T>)();
  return channels <= narrow.channels ? narrow : FUSEDRES_BEST_ISA(conv_tile<T>)();
}

}  // namespace

bool merges_columns(const Conv& conv) {
  constexpr int64_t kFew = 8;
  return conv.C < kFew && conv.axes.w.kernel > 1 && conv.axes.w.dilation == 1;
}

template <typename T>
ConvPlan gather_plan(const ConvSizes& sizes, Gather gather, int64_t workers, Weights weights) {
  return {sizes, std::move(gather), conv_tile_for<T>(sizes.K), workers, weights};
}

template <typename T>
ConvPlan fprop_plan(const Conv& conv, int64_t workers, Weights weights) {
  const ConvAxis& h = conv.axes.h;
  ConvAxis w = conv.axes.w;
  int64_t depth = conv.C;
  if (merges_columns(conv)) {
    depth *= w.kernel;
    w.in += 2 * w.padding;
    w.kernel = 1;
    w.padding = 0;
  }
  const ConvSizes sizes{conv.N, conv.K, h.in, w.in, conv.C, depth, h.out, w.out};
  return gather_plan<T>(sizes, {fprop_axis(h), fprop_axis(w)}, workers, weights);
}

template <typename T>
void run(const ConvPlan& plan, const ConvOperands<T>& operands, std::vector<ConvTable<T>>& tables) {
  const auto kernel = FUSEDRES_OF_ISA(plan.tile.isa, conv_block<T>);
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), plan.tasks());
  tables.resize(std::max<size_t>(tables.size(), workers));
  for (ConvTable<T>& table : tables) table.block = -1;
  share_tasks(workers, plan.tasks(),
              [&](int64_t worker, int64_t task) { kernel(plan, operands, task, tables[worker]); });
}

template <typename T>
void run_alone(const ConvPlan& plan, const ConvOperands<T>& operands, ConvTable<T>& table) {
  const auto kernel = FUSEDRES_OF_ISA(plan.tile.isa, conv_block<T>);
  table.block = -1;
  for (int64_t task = 0; task < plan.tasks(); ++task) kernel(plan, operands, task, table);
}

#define FUSEDRES_CONV_RUN(T)                                                                 \
  template ConvPlan gather_plan<T>(const ConvSizes&, Gather, int64_t, Weights);              \
  template ConvPlan fprop_plan<T>(const Conv&, int64_t, Weights);                            \
  template void run<T>(const ConvPlan&, const ConvOperands<T>&, std::vector<ConvTable<T>>&); \
  template void run_alone<T>(const ConvPlan&, const ConvOperands<T>&, ConvTable<T>&);
FUSEDRES_CONV_RUN(float)
FUSEDRES_CONV_RUN(double)

}  // namespace fusedres::cpu
