// Convolution of one block of pixels by one block of panels, and the packing of weights into panels. Included by
// foreach_isa.h, per instruction set.

#include "cpu/conv_pack_kernels.h"
#include "cpu/prologue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

constexpr int kConvPixels = kMicroRows, kConvVectors = kMicroVectors;

template <typename T>
constexpr int64_t kConvChannels = kConvVectors * kLanes<T>;

template <typename T>
ConvTile conv_tile() {
  return {kConvPixels, kConvChannels<T>};
}

// What becomes of the sums of a micro-tile: kept, to be added to, or written to y. With its channels from `channel` on.
template <typename T>
struct ConvFinish {
  const ConvOperands<T>* operands;
  const int64_t* outputs;
  const T* const* residual;
  int64_t channel;

  // Scale, bias, residual and ReLU on the sums of pixel i at the tile's channels c, and their way to y.
  template <typename Lanes>
  FUSEDRES_INLINE void operator()(Lanes lanes, int64_t i, int64_t c, Vec<T> value) const {
    const int64_t at = channel + c;
    if (operands->scale != nullptr) value *= lanes.load(operands->scale + at);
    if (operands->bias != nullptr) value += lanes.load(operands->bias + at);
    if (residual[i] != nullptr) value += lanes.load(residual[i] + at);
    lanes.store(operands->y + outputs[i] + at, operands->relu ? relu(value) : value);
  }
};

// sums (kPixels, kConvChannels) (+)= acc, which starts anew.
template <typename T, int kPixels>
FUSEDRES_INLINE void conv_keep(Vec<T> (&acc)[kPixels][kConvVectors], T* sums, bool is_first) {
#pragma GCC unroll 12
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kConvVectors; ++j) {
      T* to = sums + i * kConvChannels<T> + j * kLanes<T>;
      store(to, is_first ? acc[i][j] : load(to) + acc[i][j]);
      acc[i][j] = Vec<T>{};
    }
  }
}

// What a register adds up: every addition rounds, and the totals of shorter sums round less.
constexpr int64_t kLongestSum = 256;

// sums (kPixels, kConvChannels) (+)= over `taps` taps and `depth` channels of each: input * panel.
// inputs (taps, kConvPixels) point at the first channel; panel (taps, depth, kConvChannels). With `finish` the sums go
// on to y.
template <typename T, int kPixels>
void conv_micro_tile(const T* const* inputs, int64_t taps, int64_t channel, int64_t depth, const T* panel, T* sums,
                     bool is_first, const ConvFinish<T>* finish) {
  Vec<T> acc[kPixels][kConvVectors] = {};
  int64_t added = 0;
  for (int64_t tap = 0; tap < taps; ++tap, inputs += kConvPixels) {
    const T* pixels[kPixels];
#pragma GCC unroll 12
    for (int i = 0; i < kPixels; ++i) pixels[i] = inputs[i] + channel;
    for (int64_t c = 0; c < depth;) {
      if (added == kLongestSum) {
        conv_keep<T, kPixels>(acc, sums, is_first);
        is_first = false;
        added = 0;
      }
      const int64_t end = std::min(depth, c + kLongestSum - added);
      added += end - c;
#pragma GCC unroll 4
      for (; c < end; ++c, panel += kConvChannels<T>) {
        Vec<T> weights[kConvVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kConvVectors; ++j) weights[j] = load(panel + j * kLanes<T>);
#pragma GCC unroll 12
        for (int i = 0; i < kPixels; ++i) {
          const Vec<T> value = broadcast(pixels[i][c]);
#pragma GCC unroll 2
          for (int j = 0; j < kConvVectors; ++j) acc[i][j] += value * weights[j];
        }
      }
    }
  }
  if (finish == nullptr) {
    conv_keep<T, kPixels>(acc, sums, is_first);
    return;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kConvVectors; ++j) {
      const int64_t c = j * kLanes<T>;
      (*finish)(AllLanes{}, i, c, is_first ? acc[i][j] : load(sums + i * kConvChannels<T> + c) + acc[i][j]);
    }
  }
}

template <typename T>
using ConvMicroTile = void (*)(const T* const*, int64_t, int64_t, int64_t, const T*, T*, bool, const ConvFinish<T>*);

template <typename T, int kPixels = kConvPixels>
ConvMicroTile<T> conv_micro_tile_of(int64_t pixels) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) return conv_micro_tile_of<T, kPixels - 1>(pixels);
  }
  return conv_micro_tile<T, kPixels>;
}

// The same for sums that were kept: those of a ragged panel, and of taps that all lie in the padding.
template <typename T>
void conv_finish_sums(const ConvFinish<T>& finish, const T* sums, int64_t pixels, int64_t channels) {
  for_each_vector<T>(channels, [&](auto lanes, int64_t c) {
    for (int64_t i = 0; i < pixels; ++i) finish(lanes, i, c, load(sums + i * kConvChannels<T> + c));
  });
}

// Asks for the lines of `count` elements ahead of their use.
template <int kWrite, typename T>
FUSEDRES_INLINE void conv_prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, kWrite);
}

// The given rows of a panel, packed before or now. Where memory has the rows in another order, all of them with the
// first.
template <typename T>
const T* conv_panel_rows(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t panel, Range rows,
                         ConvTable<T>& table) {
  if (operands.loose == nullptr) {
    return operands.packed + panel * plan.panel_elements() + rows.begin * kConvChannels<T>;
  }
  const LooseWeight<T>& weight = *operands.loose;
  const auto pack = conv_pack_piece<T>(weight);
  if (!weight.is_in_order) {
    const int64_t all = plan.gather.taps() * plan.sizes.depth;
    table.panel.resize(all * kConvChannels<T>);
    if (rows.begin == 0) pack(plan, weight, panel, {0, all}, 0, table.panel.data());
    return table.panel.data() + rows.begin * kConvChannels<T>;
  }
  table.panel.resize(rows.size() * kConvChannels<T>);
  pack(plan, weight, panel, rows, rows.begin, table.panel.data());
  return table.panel.data();
}

// The pixels of a block by some panels. Long sums are cut into runs, whose totals are added.
template <typename T>
void conv_panels(const ConvPlan& plan, const ConvOperands<T>& operands, const Cut& tiles, Range panels,
                 ConvTable<T>& table) {
  constexpr int64_t kTile = kConvPixels * kConvChannels<T>;
  const int64_t taps = plan.gather.taps(), depth = plan.sizes.depth;
  const bool is_one_run = taps <= plan.taps_at_once && plan.runs.count == 1;
  table.sums.resize(is_one_run ? kTile : panels.size() * tiles.count * kTile);
  int64_t tap = 0;
  do {
    const int64_t run_taps = std::min(plan.taps_at_once, taps - tap);
    for (int64_t run = 0; run < plan.runs.count; ++run) {
      const Range channels = plan.runs[run];
      const bool is_first = tap == 0 && run == 0, is_last = tap + run_taps == taps && run + 1 == plan.runs.count;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t first_row = tap * depth + channels.begin;
        const Range rows{first_row, first_row + run_taps * channels.size()};
        const T* const panel = conv_panel_rows(plan, operands, p, rows, table);
        const int64_t channel = p * kConvChannels<T>;
        const int64_t width = std::min(kConvChannels<T>, plan.sizes.K - channel);
        for (int64_t t = 0; t < tiles.count; ++t) {
          T* sums = table.sums.data() + (is_one_run ? 0 : ((p - panels.begin) * tiles.count + t) * kTile);
          const Range pixels = tiles[t];
          const T* const* inputs = table.inputs.data() + (t * taps + tap) * kConvPixels;
          if (p == panels.begin && t + 1 < tiles.count) {
            for (int64_t i = 0; i < run_taps * kConvPixels; ++i) {
              conv_prefetch<0>(inputs[taps * kConvPixels + i] + channels.begin, channels.size());
            }
          }
          if (is_last) {
            for (int64_t i = pixels.begin; i < pixels.end; ++i) {
              conv_prefetch<1>(operands.y + table.outputs[i] + channel, width);
              if (table.residual[i] != nullptr) conv_prefetch<0>(table.residual[i] + channel, width);
            }
          }
          const ConvFinish<T> finish{&operands, table.outputs.data() + pixels.begin,
                                     table.residual.data() + pixels.begin, channel};
          const bool is_whole = width == kConvChannels<T>;
          const bool is_read = run_taps != 1 || !table.is_padding[t * taps + tap];
          if (is_read) {
            conv_micro_tile_of<T>(pixels.size())(inputs, run_taps, channels.begin, channels.size(), panel, sums,
                                                 is_first, is_last && is_whole ? &finish : nullptr);
          } else if (is_first) {
            std::fill_n(sums, kTile, T{0});
          }
          if (is_last && !(is_whole && is_read)) conv_finish_sums(finish, sums, pixels.size(), width);
        }
      }
    }
    tap += run_taps;
  } while (tap < taps);
}

// One task of the plan: the pixels of a block by its panels. Those that are packed on the way come one by one.
template <typename T>
void conv_block(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t task, ConvTable<T>& table) {
  const int64_t block = task / plan.panel_blocks.count;
  const Range panels = plan.panel_blocks[task % plan.panel_blocks.count];
  const Cut tiles = Cut::at_most(plan.pixel_block(block).size(), kConvPixels);
  table.build(plan, operands, block);
  if (!plan.packs_panels) return conv_panels(plan, operands, tiles, panels, table);
  for (int64_t p = panels.begin; p < panels.end; ++p) conv_panels(plan, operands, tiles, {p, p + 1}, table);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
