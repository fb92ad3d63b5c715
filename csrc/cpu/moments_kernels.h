// Sums of an activated input over a strided grid of pixels. Included by foreach_isa.h, per instruction set.

#include "cpu/prologue.h"
#include "cpu/running_sums.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// state[c] = sum of p(x) over the block's pixels, which count the grid row by row. scratch (block.width).
template <typename T, bool kHasBn>
void input_sums(const StridedInput& input, const Block& block, double* state, void* scratch) {
  using Acc = acc_t<T>;
  const Acc* scale = static_cast<const Acc*>(input.bn) + 2 * input.channels + block.channel;
  const Acc* shift = scale + input.channels;
  RunningSums<Acc> sums(1, block.width, state + block.channel, input.channels, scratch);
  for (int64_t pixel = block.row_begin; pixel < block.row_end; ++pixel) {
    const T* x = static_cast<const T*>(input.x) + input.source(pixel) * input.channels + block.channel;
    for_each_vector<T>(block.width, [=, run = sums.run](auto lanes, int64_t c) {
      Vec<Acc> value = lanes.load(x + c);
      if constexpr (kHasBn) value = relu(bn_apply(lanes.load(scale + c), value, lanes.load(shift + c)));
      lanes.store(run + c, lanes.load(run + c) + value);
    });
    sums.end_row();
  }
  sums.flush();
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
