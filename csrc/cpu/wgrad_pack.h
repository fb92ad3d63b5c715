// Packing of a weight gradient's operands: prologue, conversion and the order in which micro-tiles read.
// Included by wgrad_kernels.h, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

enum class WgradPrologue { none, dbn, bn_relu, center, bn_relu_center };

// One vector of channels, from `channel` on, through the prologue.
template <typename T, WgradPrologue kPrologue>
class WgradLoad {
 public:
  WgradLoad(const WgradOperand<T>& operand, int64_t channel)
      : data_(operand.data), z_(operand.z), numel_(operand.numel) {
    const auto fetch = [&](const acc_t<T>* row, int64_t to) {
      const int64_t left = operand.channels - channel;
      store(factors_ + to * kLanes<T>, left >= kLanes<T> ? load(row + channel) : load_partial(row + channel, left));
    };
    if constexpr (kPrologue == WgradPrologue::dbn) {
      for (int64_t i = 0; i < 4; ++i) fetch(operand.factors + i * operand.channels, i);
    }
    if constexpr (kHasBn) {
      fetch(operand.bn + 2 * operand.channels, 0);
      fetch(operand.bn + 3 * operand.channels, 1);
    }
    if constexpr (kIsCentred) fetch(operand.mean, 2);
  }

  // The vector at `index` of the tensor. A whole one may run on into the next pixel, but not past the tensor's end.
  bool is_whole(int64_t index) const { return index + kLanes<T> <= numel_; }

  FUSEDRES_INLINE Vec<acc_t<T>> whole(int64_t index) const { return apply(AllLanes{}, index); }

  FUSEDRES_INLINE Vec<acc_t<T>> ragged(int64_t index) const {
    return is_whole(index) ? whole(index) : apply(SomeLanes{numel_ - index}, index);
  }

 private:
  static constexpr bool kHasBn = kPrologue == WgradPrologue::bn_relu || kPrologue == WgradPrologue::bn_relu_center;
  static constexpr bool kIsCentred = kPrologue == WgradPrologue::center || kPrologue == WgradPrologue::bn_relu_center;

  template <typename Lanes>
  FUSEDRES_INLINE Vec<acc_t<T>> apply(Lanes lanes, int64_t index) const {
    Vec<acc_t<T>> value = lanes.load(data_ + index);
    if constexpr (kPrologue == WgradPrologue::dbn) {
      value = dbn_apply(AllLanes{}, factors_, kLanes<T>, 0, value, lanes.load(z_ + index));
    }
    if constexpr (kHasBn) value = relu(bn_apply(load(factors_), value, load(factors_ + kLanes<T>)));
    if constexpr (kIsCentred) value -= load(factors_ + 2 * kLanes<T>);
    return value;
  }

  const T *data_, *z_;
  int64_t numel_;
  acc_t<T> factors_[4 * kLanes<T>];
};

// Pixels packed at once: their lines stay in the first-level cache from panel to panel.
constexpr int64_t kWgradRun = 8;

// A run of pixels of one operand, in the tensor and in a packed block.
struct WgradRun {
  int64_t index, step, pixels;  // the first pixel's channel 0, and the distance between two, in elements
  int64_t first;                // number of the first pixel in the block
};

// Packs one vector of channels, `width` elements apart.
template <typename T, WgradPrologue kPrologue>
FUSEDRES_INLINE void wgrad_pack_vector(const WgradOperand<T>& operand, int64_t channel, WgradRun run, acc_t<T>* to,
                                       int64_t width) {
  const WgradLoad<T, kPrologue> source(operand, channel);
  int64_t from = run.index + channel;
  if (run.pixels == kWgradRun && source.is_whole(from + (kWgradRun - 1) * run.step)) {
#pragma GCC unroll 8
    for (int64_t pixel = 0; pixel < kWgradRun; ++pixel, from += run.step, to += width) store(to, source.whole(from));
  } else {
#pragma GCC unroll 1
    for (int64_t pixel = 0; pixel < run.pixels; ++pixel, from += run.step, to += width) store(to, source.ragged(from));
  }
}

// A panel's pixels need not be whole vectors: stores run over into the next pixel, which is written later. Hence pixels
// in ascending order and the vectors of one pixel in descending order.
template <typename T, WgradPrologue kPrologue>
void wgrad_pack_run(const WgradOperand<T>& operand, int64_t channel, WgradRun run, const WgradPanels& panels,
                    int64_t block_pixels, acc_t<T>* packed) {
  for (int64_t i = 0; i < panels.count(); ++i) {
    const int64_t width = panels.width(i), first_channel = channel + panels.begin(i);
    acc_t<T>* to = packed + panels.offset(i, block_pixels) + run.first * width;
    for (int64_t v = (width - 1) / kLanes<T> * kLanes<T>; v >= 0; v -= kLanes<T>) {
      wgrad_pack_vector<T, kPrologue>(operand, first_channel + v, run, to + v, width);
    }
  }
}

// The pixels of one operand in a block, in the numbers of each axis, and where in the tensor these lie. In memory the
// columns of a row are grouped by their number modulo `phases`: what one tap of a strided convolution meets is dense.
struct WgradPixels {
  Range images, rows, cols;
  int64_t row_start = 0, row_step = 1, col_start = 0, col_step = 1, phases = 1;

  int64_t count() const { return images.size() * rows.size() * cols.size(); }
};

template <typename T, WgradPrologue kPrologue>
void wgrad_pack_block(const WgradOperand<T>& operand, const WgradPixels& pixels, int64_t channel,
                      const WgradPanels& panels, acc_t<T>* packed) {
  const int64_t step = pixels.phases * pixels.col_step;
  int64_t done = 0;
  for (int64_t n = pixels.images.begin; n < pixels.images.end; ++n) {
    for (int64_t row = pixels.rows.begin; row < pixels.rows.end; ++row) {
      const int64_t source_row = (n * operand.H + pixels.row_start + row * pixels.row_step) * operand.W;
      for (int64_t phase = 0; phase < pixels.phases; ++phase) {
        const int64_t first = source_row + pixels.col_start + (pixels.cols.begin + phase) * pixels.col_step;
        const int64_t count = ceil_div(pixels.cols.size() - phase, pixels.phases);
        for (int64_t col = 0; col < count; col += kWgradRun) {
          const WgradRun run{(first + col * step) * operand.channels, step * operand.channels,
                             std::min(kWgradRun, count - col), done};
          wgrad_pack_run<T, kPrologue>(operand, channel, run, panels, pixels.count(), packed);
          done += run.pixels;
        }
      }
    }
  }
}

template <typename T>
void wgrad_pack(const WgradOperand<T>& operand, const WgradPixels& pixels, int64_t channel, const WgradPanels& panels,
                acc_t<T>* packed) {
  const auto pack = operand.factors != nullptr ? wgrad_pack_block<T, WgradPrologue::dbn>
                    : operand.bn == nullptr
                        ? (operand.mean == nullptr ? wgrad_pack_block<T, WgradPrologue::none>
                                                   : wgrad_pack_block<T, WgradPrologue::center>)
                        : (operand.mean == nullptr ? wgrad_pack_block<T, WgradPrologue::bn_relu>
                                                   : wgrad_pack_block<T, WgradPrologue::bn_relu_center>);
  pack(operand, pixels, channel, panels, packed);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
