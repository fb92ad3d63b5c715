// Fetching of the next block while this one is multiplied: packing would otherwise wait for memory.
// Included by wgrad_kernels.h, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// Goes through the pixels of one operand's block, and brings their channels to the second-level cache.
template <typename T>
class WgradPrefetch {
 public:
  // The whole block takes `calls` calls of advance().
  WgradPrefetch(const WgradOperand<T>& operand, const WgradPixels& pixels, Range channels, int64_t calls)
      : operand_(operand),
        pixels_(pixels),
        channels_(channels),
        stride_(std::max<int64_t>(kLine / (operand.channels * pixels.col_step), 1)),
        n_(pixels.images.begin),
        row_(pixels.rows.begin),
        col_(pixels.cols.begin),
        step_(ceil_div(pixels.images.size() * pixels.rows.size() * ceil_div(pixels.cols.size(), stride_), calls)) {}

  void advance() {
    for (int64_t i = 0; i < step_ && n_ < pixels_.images.end; ++i) {
      const int64_t pixel = (n_ * operand_.H + pixels_.row_start + row_ * pixels_.row_step) * operand_.W +
                            pixels_.col_start + col_ * pixels_.col_step;
      fetch(operand_.data + pixel * operand_.channels);
      if (operand_.z != nullptr) fetch(operand_.z + pixel * operand_.channels);
      if ((col_ += stride_) < pixels_.cols.end) continue;
      col_ = pixels_.cols.begin;
      if (++row_ < pixels_.rows.end) continue;
      row_ = pixels_.rows.begin;
      ++n_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  void fetch(const T* pixel) const {
    for (int64_t c = channels_.begin; c < channels_.end; c += kLine) __builtin_prefetch(pixel + c, 0, 2);
  }

  const WgradOperand<T>& operand_;
  const WgradPixels pixels_;
  const Range channels_;
  const int64_t stride_;  // pixels to the next line, where several share one
  int64_t n_, row_, col_;
  const int64_t step_;  // pixels, or groups of them, at each call
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
