// Sums over the rows of a block: short runs in the accumulation type, their totals in double. Included per instruction
// set.

namespace fusedres::cpu::FUSEDRES_ISA {

template <typename Acc>
class RunningSums {
 public:
  // `count` sums of `width` channels each. total (count, total_stride) double; scratch (count, width).
  RunningSums(int64_t count, int64_t width, double* total, int64_t total_stride, void* scratch)
      : run(static_cast<Acc*>(scratch)), total_(total), count_(count), width_(width), total_stride_(total_stride) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width; ++c) run[i * width + c] = total[i * total_stride + c] = 0;
    }
  }

  void end_row() {
    if (++rows_ % kRunRows == 0) flush();
  }

  void flush() {
    for (int64_t i = 0; i < count_; ++i) {
      Acc* __restrict from = run + i * width_;
      double* __restrict to = total_ + i * total_stride_;
      for (int64_t c = 0; c < width_; ++c) {
        to[c] += from[c];
        from[c] = 0;
      }
    }
  }

  Acc* const run;  // (count, width): add to it, then call end_row

 private:
  static constexpr int64_t kRunRows = 16;  // ATen adds all in double; longer runs lose a digit to it

  double* const total_;
  const int64_t count_, width_, total_stride_;
  int64_t rows_ = 0;
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
