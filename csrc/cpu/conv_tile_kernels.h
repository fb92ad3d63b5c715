// The micro-tile of a convolution: points by the channels of one panel, and what becomes of its sums. Included by
// conv_kernels.h, per instruction set.

#include "cpu/prologue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

constexpr int kConvPoints = kMicroRows, kConvVectors = kMicroVectors;

template <typename T>
constexpr int64_t kConvChannels = kConvVectors * kLanes<T>;

template <typename T>
constexpr int64_t kConvTile = kConvPoints * kConvChannels<T>;

template <typename T>
ConvTile conv_tile() {
  return {Isa::FUSEDRES_ISA, kConvPoints, kConvChannels<T>};
}

// function(pixel, channel of the tile, value) for every vector of a micro-tile, all in registers.
template <typename T, int kPixels, typename Function>
FUSEDRES_INLINE void for_each_of(Vec<T> (&acc)[kPixels][kConvVectors], const Function& function) {
#pragma GCC unroll 12
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kConvVectors; ++j) function(i, j * kLanes<T>, acc[i][j]);
  }
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

  // The same on the sums of a whole tile, which stay in registers: what to do is asked once, not at every vector.
  template <int kPixels>
  FUSEDRES_INLINE void operator()(Vec<T> (&acc)[kPixels][kConvVectors]) const {
    if (operands->scale != nullptr) {
      const T* const scale = operands->scale + channel;
      for_each_of<T>(acc, [&](int, int64_t c, Vec<T>& value) { value *= load(scale + c); });
    }
    if (operands->bias != nullptr) {
      const T* const bias = operands->bias + channel;
      for_each_of<T>(acc, [&](int, int64_t c, Vec<T>& value) { value += load(bias + c); });
    }
    for_each_of<T>(acc, [&](int i, int64_t c, Vec<T>& value) {
      if (residual[i] != nullptr) value += load(residual[i] + channel + c);
    });
    if (operands->relu) for_each_of<T>(acc, [&](int, int64_t, Vec<T>& value) { value = relu(value); });
    T* const y = operands->y + channel;
    for_each_of<T>(acc, [&](int i, int64_t c, Vec<T>& value) { store(y + outputs[i] + c, value); });
  }
};

// sums (kPixels, kConvChannels) (+)= acc, which starts anew.
template <typename T, int kPixels>
FUSEDRES_INLINE void conv_keep(Vec<T> (&acc)[kPixels][kConvVectors], T* sums, bool is_first) {
  for_each_of<T>(acc, [&](int i, int64_t c, Vec<T>& value) {
    T* const to = sums + i * kConvChannels<T> + c;
    store(to, is_first ? value : load(to) + value);
    value = Vec<T>{};
  });
}

// Weights that are wanted next. The caches of a CPU follow a panel, but not from one to the next, and where few pixels
// meet it, waiting for its first lines is much of the time: micro-tiles ask for the next while they compute.
template <typename T>
struct ConvAhead {
  static constexpr int64_t kLine = 64 / sizeof(T), kSteps = 2;  // a line every two steps of the depth

  const T *at = nullptr, *end = nullptr;

  // From where on a micro-tile of so many steps asks; from `idle` on where all was asked for.
  const T* take(int64_t steps, const T* idle) {
    if (at >= end) return idle;
    const T* const from = at;
    at += steps / kSteps * kLine;
    return from;
  }
};

// The weights from panel `index` on, before they are packed.
template <typename T>
ConvAhead<T> conv_ahead(const LooseWeight<T>& weight, int64_t index) {
  const T* const panel = weight.w + index * kConvChannels<T> * weight.order.step;
  return {panel, panel + kConvChannels<T> * weight.order.step};
}

// What a register adds up: every addition rounds, and the totals of shorter sums round less.
constexpr int64_t kLongestSum = 256;

// sums (kPixels, kConvChannels) (+)= over `taps` taps and `depth` channels of each: input * panel.
// inputs (taps, kConvPoints) point at the first channel; panel (taps, depth, kConvChannels). With `finish` the sums go
// on to y. Asks for memory from `ahead` on.
template <typename T, int kPixels>
void conv_micro_tile(const T* const* inputs, int64_t taps, int64_t channel, int64_t depth, const T* panel, T* sums,
                     bool is_first, const ConvFinish<T>* finish, const T* ahead) {
  Vec<T> acc[kPixels][kConvVectors] = {};
  int64_t added = 0;
  for (int64_t tap = 0; tap < taps; ++tap, inputs += kConvPoints) {
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
      const auto step = [&]() __attribute__((always_inline)) {
        Vec<T> weights[kConvVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kConvVectors; ++j) weights[j] = load(panel + j * kLanes<T>);
#pragma GCC unroll 12
        for (int i = 0; i < kPixels; ++i) {
          const Vec<T> value = broadcast(pixels[i][c]);
#pragma GCC unroll 2
          for (int j = 0; j < kConvVectors; ++j) acc[i][j] += value * weights[j];
        }
        ++c;
        panel += kConvChannels<T>;
      };
      for (; c + ConvAhead<T>::kSteps <= end; ahead += ConvAhead<T>::kLine) {
        __builtin_prefetch(ahead);
#pragma GCC unroll 4
        for (int64_t i = 0; i < ConvAhead<T>::kSteps; ++i) step();
      }
      while (c < end) step();
    }
  }
  if (finish == nullptr) {
    conv_keep<T, kPixels>(acc, sums, is_first);
    return;
  }
  if (!is_first) {
    for_each_of<T>(acc, [&](int i, int64_t c, Vec<T>& value) { value += load(sums + i * kConvChannels<T> + c); });
  }
  (*finish)(acc);
}

template <typename T>
using ConvMicroTile = void (*)(const T* const*, int64_t, int64_t, int64_t, const T*, T*, bool, const ConvFinish<T>*,
                               const T*);

template <typename T, int kPixels = kConvPoints>
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
template <typename T>
FUSEDRES_INLINE void conv_prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
